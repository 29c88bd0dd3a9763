"""Weights looked up in tables, one by one or as vectors."""
