"""Answers from Core ML packages: by `mil`, or by Core ML itself on a Mac."""
