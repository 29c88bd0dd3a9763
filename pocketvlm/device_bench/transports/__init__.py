"""The ways to reach a device: one module per kind."""
