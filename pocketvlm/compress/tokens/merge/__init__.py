"""Reducers that average tokens which are alike."""
