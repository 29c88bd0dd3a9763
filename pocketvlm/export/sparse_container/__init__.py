"""Masked weights on disk: what the mask keeps and nothing else."""
