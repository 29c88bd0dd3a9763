"""Decodes compressed weights: every `constexpr_*` operator, exactly.

Each function is the definition in the operator's specification, in float32 until the one rounding
to its result's type. Iterated blocks and groups run along every axis at once: a scale, offset or
table of shape [s0, s1, ...] belongs to blocks of shape [n0 / s0, n1 / s1, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from pocketvlm.emulation.mil.types import Array, unpack_bits

__all__ = ["CONSTEXPR", "Decoder"]

Decoder = Callable[..., Array | tuple[Array, ...]]
"""Arguments by the names of the specification; operators with two results return both."""


def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """`scale * (data - offset)`, scale and offset for each block."""
    codes = data.astype(np.float32)
    if offset is not None:
        codes -= _spread(offset.astype(np.float32), data.shape)
    return codes * _spread(scale, data.shape)


def lut_to_dense(indices: Array, lut: Array, vector_axis: Array | None = None) -> Array:
    """Entries of a table, or vectors that lie along an axis.

    Args:
        indices: Codes of rank K.
        lut: [groups along each of the K axes..., entries, vector length].
        vector_axis: Where vectors longer than 1 lie.
    """
    entries, length = lut.shape[-2:]
    groups = lut.shape[:-2]
    tables = lut.reshape(-1, entries, length)
    # Number of the table of each element, then of its entry among all tables' entries.
    numbers = np.arange(len(tables)).reshape(groups)
    rows = _spread(numbers, indices.shape) * entries + indices
    vectors = tables.reshape(-1, length)[rows]
    if length == 1:
        return vectors[..., 0]
    axis = _vector_axis(vector_axis, indices.ndim)
    shape = list(indices.shape)
    shape[axis] *= length
    return np.moveaxis(vectors, -1, axis + 1).reshape(shape)


def sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    """Values where the mask has a 1, row by row; zero elsewhere.

    Args:
        nonzero_data: The values.
        mask: A 0 or 1 per element; with `shape`, packed bits.
        shape: Shape of the result, in the form of iOS 16.
    """
    bits = mask
    if shape is not None:
        bits = unpack_bits(mask, 1, int(shape.prod())).reshape(tuple(shape))
    dense = np.zeros(bits.shape, nonzero_data.dtype)
    dense[bits != 0] = nonzero_data
    return dense


def lut_to_sparse(
    indices_mask: Array, indices_nonzero_data: Array, lut: Array, vector_axis: Array | None = None
) -> tuple[Array, Array]:
    """Table entries of the codes where the mask has a 1: the mask of the result, and the values."""
    dense = lut_to_dense(sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis)
    mask = indices_mask
    if lut.shape[-1] > 1:
        mask = np.repeat(mask, lut.shape[-1], axis=_vector_axis(vector_axis, mask.ndim))
    return mask, dense[mask != 0]


def sparse_blockwise_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    """Shifted and scaled codes where the mask has a 1: the mask, and the values."""
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


def affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> Array:
    """`scale * (data - zero_point)`, both for the tensor or for each place of an axis."""
    place = int(axis) % quantized_data.ndim
    shape = [-1 if number == place else 1 for number in range(quantized_data.ndim)]
    wide = [value.reshape(shape) if value.ndim else value for value in (zero_point, scale)]
    return (quantized_data.astype(np.float32) - wide[0].astype(np.float32)) * wide[1]


def packed_lut_to_dense(indices: Array, lut: Array, shape: Array) -> Array:
    """Entries of one table, by packed codes: the form of iOS 16."""
    bits = int(np.log2(lut.size))
    codes = unpack_bits(indices, bits, int(shape.prod()))
    return lut.reshape(-1)[codes].reshape(tuple(shape))


def cast(source_val: Array, output_dtype: Array) -> Array:
    """The same values; the declared type of the result widens them."""
    return source_val


def _lut_to_dense(
    indices: Array, lut: Array, vector_axis: Array | None = None, shape: Array | None = None
) -> Array:
    """Either form; only that of iOS 16 states the shape of the result."""
    if shape is not None:
        return packed_lut_to_dense(indices, lut, shape)
    return lut_to_dense(indices, lut, vector_axis)


def _spread(values: Array, shape: tuple[int, ...]) -> Array:
    """Repeats the value of each block over its block."""
    for axis, (blocks, size) in enumerate(zip(values.shape, shape, strict=True)):
        if size % blocks:
            raise ValueError(f"{blocks} blocks do not divide the {size} elements of axis {axis}")
        if blocks not in (1, size):
            values = np.repeat(values, size // blocks, axis)
    return np.broadcast_to(values, shape)


def _vector_axis(axis: Array | None, rank: int) -> int:
    if axis is None:
        raise ValueError("vectors longer than 1 need a vector_axis")
    return int(axis) % rank


CONSTEXPR: Mapping[str, Decoder] = {
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_cast": cast,
    "constexpr_lut_to_dense": _lut_to_dense,
    "constexpr_lut_to_sparse": lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": sparse_to_dense,
}
"""The decoder of each operator."""
