"""Answers from Core ML packages: by the reference evaluator, or by Core ML itself on a Mac."""
