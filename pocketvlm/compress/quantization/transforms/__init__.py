"""Changes of float weights that cancel, made before weights are rounded."""
