"""Times of an answer without a measurement: counted operators at the rates of kernels."""
