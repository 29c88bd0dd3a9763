"""What a model is, as plain data."""
