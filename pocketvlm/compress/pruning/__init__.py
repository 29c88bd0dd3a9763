"""Pruning: which weights a model can do without, and what is left of its bytes and its time."""
