"""Group-wise affine integers: rounding to nearest, GPTQ, AWQ."""
