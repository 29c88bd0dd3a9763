"""The pass over a model in order of execution, and the statistics taken on it."""
