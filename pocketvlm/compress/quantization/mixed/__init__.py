"""A form for each layer under one budget of bytes."""
