"""Reducers that average neighbours."""
