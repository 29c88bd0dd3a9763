"""Operators that sum: products, convolutions, attention, norms and reductions.

Everything is accumulated in float32 and rounded once, after the operator. Parameters are named
and defaulted as in the operators' specification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from pocketvlm.emulation.mil.types import Array

__all__ = ["NEURAL"]


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """X times the transpose of [out, in], plus a bias."""
    product = x @ weight.T
    return product if bias is None else product + bias


def matmul(
    x: Array, y: Array, transpose_x: Array | bool = False, transpose_y: Array | bool = False
) -> Array:
    """Matrix products over the last two axes."""
    left = x.swapaxes(-2, -1) if transpose_x else x
    right = y.swapaxes(-2, -1) if transpose_y else y
    return left @ right


def einsum(values: Sequence[Array], equation: Array) -> Array:
    """A product by Einstein's rule."""
    return np.einsum(str(equation.item()), *values, optimize=True)


def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Array | None = None,
    pad_type: Array | None = None,
    pad: Array | None = None,
    dilations: Array | None = None,
    groups: Array | int = 1,
) -> Array:
    """A convolution over any number of spatial axes: [n, in, ...] to [n, out, ...]."""
    kernel, parts = weight.shape[2:], int(groups)
    axes = len(kernel)
    windows = _windows(x, kernel, strides, pad_type, pad, dilations)
    # [n, out spatial..., in, kernel...] times [out, in, kernel...], group by group.
    windows = np.moveaxis(windows, 1, 1 + axes)
    size = weight.shape[0] // parts
    width = weight.shape[1]
    joined = []
    for part in range(parts):
        own = weight[part * size : (part + 1) * size]
        seen = np.take(windows, np.arange(part * width, (part + 1) * width), 1 + axes)
        rows = seen.reshape(*seen.shape[: 1 + axes], -1)
        joined.append(rows @ own.reshape(size, -1).T)
    result = np.concatenate(joined, -1)
    if bias is not None:
        result = result + bias
    return np.moveaxis(result, -1, 1)


def avg_pool(
    x: Array,
    kernel_sizes: Array,
    pad_type: Array,
    strides: Array | None = None,
    pad: Array | None = None,
    exclude_padding_from_average: Array | bool = False,
    ceil_mode: Array | bool = False,
) -> Array:
    """Means of windows."""
    _refuse_ceil_mode(ceil_mode)
    kernel = tuple(int(size) for size in kernel_sizes)
    axes = tuple(range(-len(kernel), 0))
    sums = _windows(x, kernel, strides, pad_type, pad).sum(axes)
    if not exclude_padding_from_average:
        return sums / np.prod(kernel)
    return sums / _windows(np.ones_like(x), kernel, strides, pad_type, pad).sum(axes)


def max_pool(
    x: Array,
    kernel_sizes: Array,
    pad_type: Array,
    strides: Array | None = None,
    pad: Array | None = None,
    ceil_mode: Array | bool = False,
) -> Array:
    """Largest values of windows."""
    _refuse_ceil_mode(ceil_mode)
    kernel = tuple(int(size) for size in kernel_sizes)
    windows = _windows(x, kernel, strides, pad_type, pad, fill=-np.inf)
    return windows.max(tuple(range(-len(kernel), 0)))


def _refuse_ceil_mode(ceil_mode: Array | bool) -> None:
    if ceil_mode:
        raise ValueError("ceil_mode is not supported by this evaluator")


def _windows(
    x: Array,
    kernel: tuple[int, ...],
    strides: Array | None,
    pad_type: Array | None,
    pad: Array | None,
    dilations: Array | None = None,
    fill: float = 0.0,
) -> Array:
    """Views of every window: [n, channels, out spatial..., kernel...]."""
    axes = len(kernel)
    steps = [1] * axes if strides is None else [int(step) for step in strides]
    gaps = [1] * axes if dilations is None else [int(gap) for gap in dilations]
    spans = [(size - 1) * gap + 1 for size, gap in zip(kernel, gaps, strict=True)]
    margins = _margins(x.shape[2:], spans, steps, pad_type, pad)
    wide = np.pad(x, [(0, 0), (0, 0), *margins], constant_values=fill)
    windows = sliding_window_view(wide, spans, axis=tuple(range(2, 2 + axes)))
    places = tuple(slice(None, None, step) for step in (1, 1, *steps, *gaps))
    return windows[places]


def _margins(
    sizes: Sequence[int],
    spans: Sequence[int],
    steps: Sequence[int],
    pad_type: Array | None,
    pad: Array | None,
) -> list[tuple[int, int]]:
    kind = "valid" if pad_type is None else str(pad_type.item())
    if kind == "valid":
        return [(0, 0)] * len(sizes)
    if kind == "custom":
        given = [] if pad is None else pad.tolist()
        return [(given[2 * axis], given[2 * axis + 1]) for axis in range(len(sizes))]
    if kind not in ("same", "same_lower"):
        raise ValueError(f"pad_type is {kind!r}")
    margins = []
    for size, span, step in zip(sizes, spans, steps, strict=True):
        total = max((-(-size // step) - 1) * step + span - size, 0)
        small, large = total // 2, total - total // 2
        margins.append((large, small) if kind == "same_lower" else (small, large))
    return margins


def softmax(x: Array, axis: Array | int = -1) -> Array:
    """Exponentials that sum to 1 along an axis."""
    place = int(axis)
    weights = np.exp(x - x.max(place, keepdims=True))
    return weights / weights.sum(place, keepdims=True)


def scaled_dot_product_attention(
    query: Array, key: Array, value: Array, attn_mask: Array | None = None
) -> Array:
    """softmax(q k^T / sqrt(width) + mask) v; a boolean mask says what is seen."""
    scores = query @ key.swapaxes(-2, -1) / np.float32(np.sqrt(query.shape[-1]))
    if attn_mask is not None:
        if attn_mask.dtype == np.bool_:
            scores = np.where(attn_mask, scores, np.float32(-np.inf))
        else:
            scores = scores + attn_mask
    return softmax(scores) @ value


def layer_norm(
    x: Array,
    axes: Array | None = None,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Array | float = 1e-5,
) -> Array:
    """Zero mean and unit variance over some, or all, axes; then scaled and shifted."""
    over = tuple(range(x.ndim) if axes is None else sorted(int(axis) % x.ndim for axis in axes))
    centred = x - x.mean(over, keepdims=True)
    variance = np.square(centred).mean(over, keepdims=True)
    result = centred / np.sqrt(variance + np.float32(epsilon))
    shape = [x.shape[axis] if axis in over else 1 for axis in range(x.ndim)]
    if gamma is not None:
        result = result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


def batch_norm(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Array | float = 1e-5,
) -> Array:
    """Scaled and shifted by given statistics of each channel, the second axis."""
    shape = [1, -1, *[1] * (x.ndim - 2)]
    result = (x - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + np.float32(epsilon))
    if gamma is not None:
        result = result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


def l2_norm(x: Array, epsilon: Array | float = 1e-6) -> Array:
    """Divided by the root of the sum of squares over the last three axes."""
    squares = np.square(x).sum((-3, -2, -1), keepdims=True)
    return x / np.sqrt(squares + np.float32(epsilon))


def _reduction(function: Callable[..., Array]) -> Callable[..., Array]:
    def operator(x: Array, axes: Array | None = None, keep_dims: Array | bool = False) -> Array:
        over = None if axes is None else tuple(int(axis) for axis in axes)
        return np.asarray(function(x, axis=over, keepdims=bool(keep_dims)))

    return operator


def _place_of(function: Callable[..., Array]) -> Callable[..., Array]:
    def operator(
        x: Array,
        axis: Array | int = -1,
        keep_dims: Array | bool = False,
        output_dtype: Array | None = None,
    ) -> Array:
        return np.asarray(function(x, axis=int(axis), keepdims=bool(keep_dims)))

    return operator


def _l1(x: Array, **where: object) -> Array:
    return _sum(np.abs(x), **where)


def _l2(x: Array, **where: object) -> Array:
    return np.sqrt(_sum(np.square(x), **where))


def _sum_square(x: Array, **where: object) -> Array:
    return _sum(np.square(x), **where)


def _log_sum_exp(x: Array, axis: tuple[int, ...] | None, keepdims: bool) -> Array:
    top = x.max(axis, keepdims=True)
    sums = np.log(np.exp(x - top).sum(axis, keepdims=True)) + top
    return sums if keepdims else sums.squeeze(axis)


_sum: Callable[..., Array] = np.sum

NEURAL: Mapping[str, Callable[..., Array]] = {
    "avg_pool": avg_pool,
    "batch_norm": batch_norm,
    "conv": conv,
    "einsum": einsum,
    "l2_norm": l2_norm,
    "layer_norm": layer_norm,
    "linear": linear,
    "matmul": matmul,
    "max_pool": max_pool,
    "reduce_argmax": _place_of(np.argmax),
    "reduce_argmin": _place_of(np.argmin),
    "reduce_l1_norm": _reduction(_l1),
    "reduce_l2_norm": _reduction(_l2),
    "reduce_log_sum_exp": _reduction(_log_sum_exp),
    "reduce_max": _reduction(np.max),
    "reduce_mean": _reduction(np.mean),
    "reduce_min": _reduction(np.min),
    "reduce_prod": _reduction(np.prod),
    "reduce_sum": _reduction(np.sum),
    "reduce_sum_square": _reduction(_sum_square),
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "softmax": softmax,
}
"""The function of each operator."""
