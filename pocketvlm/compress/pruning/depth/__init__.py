"""Transformer blocks removed whole."""
