"""Losses of answers, and their gradients, one block at a time."""
