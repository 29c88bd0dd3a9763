"""Weights set to zero one by one or in patterns: scores, allocations, and one pass."""
