"""Reducers that look at nothing: what every score has to beat."""
