"""Reducers that keep tokens which are unlike each other."""
