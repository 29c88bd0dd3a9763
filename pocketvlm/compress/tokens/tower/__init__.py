"""Fewer tokens inside the vision tower."""
