"""The Python runner as a self-contained folder, for machines without this package."""
