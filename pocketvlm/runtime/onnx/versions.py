"""Which versions of ONNX Runtime read this package's graphs correctly.

Found by running every operator and bit width in each version against float64. What older versions
read otherwise is not written (`export/onnx/weights.py`), or named here.
"""

from __future__ import annotations

__all__ = ["FLOAT_ZEROS_2BIT_VERSION", "INT8_CACHE_VERSION", "LOWEST_ONNX_VERSION"]

LOWEST_ONNX_VERSION = "1.25.0"
"""The lowest version that answers from bundles as later ones do. The package itself asks for more:
its simulation of int8 activations follows the kernels that 1.28 brought for 2-bit codes."""

INT8_CACHE_VERSION = "1.27.0"
"""The first whose `GroupQueryAttention` keeps an int8 cache; older ones fail when they are run."""

FLOAT_ZEROS_2BIT_VERSION = "1.27.0"
"""The first whose `MatMulNBits` takes 2-bit codes with zero points that are floats."""
