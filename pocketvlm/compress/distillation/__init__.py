"""Recovery: a compressed model learns from the float model that it came from."""
