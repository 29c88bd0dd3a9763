"""Reducers that keep the tokens of highest score."""
