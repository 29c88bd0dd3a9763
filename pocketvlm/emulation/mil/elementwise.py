"""Operators that work element by element, with broadcasting, and activations.

Parameters are named and defaulted as in the operators' specification. Floats arrive in float32;
the result is rounded by the caller to the type that the program declares.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import numpy as np

from pocketvlm.emulation.mil.types import Array

__all__ = ["ELEMENTWISE", "erf"]

_ERF_STEPS, _ERF_END = 128, 6
"""Knots per unit, and where erf is 1 to the last bit of float32."""


def erf(x: Array) -> Array:
    """The error function, to 1e-10: a cubic between knots with exact values and slopes."""
    values, slopes = _erf_knots()
    size = np.minimum(np.abs(x).astype(np.float64), _ERF_END) * _ERF_STEPS
    knot = np.minimum(np.nan_to_num(size), len(values) - 2).astype(np.int64)  # NaN stays in t
    t = size - knot
    left, right = values[knot], values[knot + 1]
    rise, fall = slopes[knot] / _ERF_STEPS, slopes[knot + 1] / _ERF_STEPS
    # Hermite's form: the line between the knots, bent by the slopes.
    bend = (1 - t) * (rise - (right - left)) - t * (fall - (right - left))
    return np.copysign(left + t * (right - left) + t * (1 - t) * bend, x).astype(x.dtype)


@functools.cache
def _erf_knots() -> tuple[Array, Array]:
    places = [number / _ERF_STEPS for number in range(_ERF_STEPS * _ERF_END + 1)]
    values = np.array([math.erf(place) for place in places])
    slopes = np.array([2 / math.sqrt(math.pi) * math.exp(-place * place) for place in places])
    return values, slopes


def cast(x: Array, dtype: Array) -> Array:
    """The same values as another type: fractions are cut off, and all but zero is true."""
    name = str(dtype.item())
    if name == "bool":
        return x != 0
    return np.trunc(x) if "int" in name and x.dtype.kind == "f" else x


def clip(x: Array, alpha: Array, beta: Array) -> Array:
    """Between `alpha` and `beta`."""
    return np.minimum(np.maximum(x, alpha), beta)


def gelu(x: Array, mode: Array | None = None) -> Array:
    """GELU, exact or by one of its two approximations."""
    kind = "EXACT" if mode is None else str(mode.item())
    if kind == "EXACT":
        return x * np.float32(0.5) * (1 + erf(x * np.float32(1 / math.sqrt(2))))
    if kind == "TANH_APPROXIMATION":
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
        return x * np.float32(0.5) * (1 + np.tanh(inner))
    if kind == "SIGMOID_APPROXIMATION":
        return x * sigmoid(np.float32(1.702) * x)
    raise ValueError(f"mode is {kind!r}")


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), written so that nothing overflows."""
    return np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * x))


def silu(x: Array) -> Array:
    """X times its sigmoid."""
    return x * sigmoid(x)


def elu(x: Array, alpha: Array) -> Array:
    """x, or alpha * (exp(x) - 1) below zero."""
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def leaky_relu(x: Array, alpha: Array) -> Array:
    """x, or alpha * x below zero."""
    return np.where(x >= 0, x, alpha * x)


def relu(x: Array) -> Array:
    """At least 0."""
    return np.maximum(x, 0)


def relu6(x: Array) -> Array:
    """Between 0 and 6."""
    return np.minimum(np.maximum(x, 0), 6)


def softplus(x: Array) -> Array:
    """log(1 + exp(x))."""
    return np.logaddexp(x, np.float32(0))


def threshold(x: Array, alpha: Array) -> Array:
    """At least `alpha`."""
    return np.maximum(x, alpha)


def inverse(x: Array, epsilon: Array | float = 1e-4) -> Array:
    """1 / (x + epsilon)."""
    return 1 / (x + np.float32(epsilon))


def log(x: Array, epsilon: Array | float = 1e-45) -> Array:
    """The natural logarithm of x + epsilon."""
    return np.log(x + np.float32(epsilon))


def rsqrt(x: Array, epsilon: Array | float = 1e-12) -> Array:
    """1 / sqrt(x + epsilon)."""
    return 1 / np.sqrt(x + np.float32(epsilon))


def identity(x: Array) -> Array:
    """X."""
    return x


def select(cond: Array, a: Array, b: Array) -> Array:
    """`a` where the condition is true, else `b`."""
    return np.where(cond, a, b)


def _unary(function: Callable[[Array], Array]) -> Callable[..., Array]:
    def operator(x: Array) -> Array:
        return function(x)

    return operator


def _binary(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    def operator(x: Array, y: Array) -> Array:
        return function(x, y)

    return operator


ELEMENTWISE: Mapping[str, Callable[..., Array]] = {
    "abs": _unary(np.abs),
    "add": _binary(np.add),
    "cast": cast,
    "ceil": _unary(np.ceil),
    "clip": clip,
    "cos": _unary(np.cos),
    "elu": elu,
    "equal": _binary(np.equal),
    "erf": _unary(erf),
    "exp": _unary(np.exp),
    "exp2": _unary(np.exp2),
    "floor": _unary(np.floor),
    "floor_div": _binary(np.floor_divide),
    "gelu": gelu,
    "greater": _binary(np.greater),
    "greater_equal": _binary(np.greater_equal),
    "identity": identity,
    "inverse": inverse,
    "leaky_relu": leaky_relu,
    "less": _binary(np.less),
    "less_equal": _binary(np.less_equal),
    "log": log,
    "logical_and": _binary(np.logical_and),
    "logical_not": _unary(np.logical_not),
    "logical_or": _binary(np.logical_or),
    "logical_xor": _binary(np.logical_xor),
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "mod": _binary(np.mod),
    "mul": _binary(np.multiply),
    "not_equal": _binary(np.not_equal),
    "pow": _binary(np.power),
    "real_div": _binary(np.true_divide),
    "relu": relu,
    "relu6": relu6,
    "round": _unary(np.round),
    "rsqrt": rsqrt,
    "select": select,
    "sigmoid": sigmoid,
    "sign": _unary(np.sign),
    "silu": silu,
    "sin": _unary(np.sin),
    "softplus": softplus,
    "sqrt": _unary(np.sqrt),
    "square": _unary(np.square),
    "sub": _binary(np.subtract),
    "tan": _unary(np.tan),
    "tanh": _unary(np.tanh),
    "threshold": threshold,
}
"""The function of each operator."""
