"""Targets: each turns a checkpoint into the graphs of one runtime; none knows a compressor."""
