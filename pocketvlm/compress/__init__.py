"""Compression methods, one file each, and what several kinds of them stand on."""
