"""What every method shares that goes through a model layer by layer."""
