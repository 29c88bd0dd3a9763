"""Operators that index and sort: gathers, scatters, top-k.

Parameters are named and defaulted as in the operators' specification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pocketvlm.emulation.mil.types import Array

__all__ = ["INDEXING"]


def gather(
    x: Array,
    indices: Array,
    axis: Array | int = 0,
    batch_dims: Array | int = 0,
    validate_indices: Array | bool = False,
) -> Array:
    """Slices of x by their place along an axis; the first `batch_dims` axes go in step."""
    place, batch = int(axis) % x.ndim, int(batch_dims)
    if batch == 0:
        return np.take(x, indices.astype(np.int64), place)
    rows = int(np.prod(x.shape[:batch]))
    wide = x.reshape(rows, *x.shape[batch:])
    numbers = indices.astype(np.int64).reshape(rows, *indices.shape[batch:])
    taken = np.stack([np.take(wide[row], numbers[row], place - batch) for row in range(rows)])
    return taken.reshape(*x.shape[:batch], *taken.shape[1:])


def gather_along_axis(
    x: Array, indices: Array, axis: Array | int = 0, validate_indices: Array | bool = False
) -> Array:
    """For each element of `indices`, the element of x that stands there along the axis."""
    return np.take_along_axis(x, indices.astype(np.int64), int(axis))


def gather_nd(
    x: Array,
    indices: Array,
    batch_dims: Array | int = 0,
    validate_indices: Array | bool = False,
) -> Array:
    """Slices of x by their place along the first axes after the batch."""
    batch = int(batch_dims)
    own = [
        np.arange(size).reshape([-1 if axis == place else 1 for axis in range(indices.ndim - 1)])
        for place, size in enumerate(x.shape[:batch])
    ]
    given = [indices[..., place].astype(np.int64) for place in range(indices.shape[-1])]
    return x[(*own, *given)]


def scatter(
    data: Array,
    indices: Array,
    updates: Array,
    axis: Array | int = 0,
    mode: Array | None = None,
    validate_indices: Array | bool = False,
) -> Array:
    """Slices of the data along an axis, added to or replaced."""
    result = data.copy()
    place = (slice(None),) * (int(axis) % data.ndim) + (indices.astype(np.int64),)
    _combine(result, place, updates, mode)
    return result


def scatter_along_axis(
    data: Array,
    indices: Array,
    updates: Array,
    axis: Array | int = 0,
    mode: Array | None = None,
    validate_indices: Array | bool = False,
) -> Array:
    """For each update, the element of the data that stands at its index along the axis."""
    result = data.copy()
    numbers = indices.astype(np.int64)
    place: list[Array] = list(np.indices(numbers.shape, sparse=True))
    place[int(axis) % data.ndim] = numbers
    _combine(result, tuple(place), updates, mode)
    return result


def scatter_nd(
    data: Array,
    indices: Array,
    updates: Array,
    mode: Array | None = None,
    validate_indices: Array | bool = False,
) -> Array:
    """Slices of the data by their place along the first axes."""
    result = data.copy()
    place = tuple(indices[..., axis].astype(np.int64) for axis in range(indices.shape[-1]))
    _combine(result, place, updates, mode)
    return result


def _combine(target: Array, place: Any, updates: Array, mode: Array | None) -> None:
    kind = "add" if mode is None else str(mode.item())
    if kind == "update":
        target[place] = updates
    elif kind in _COMBINERS:
        _COMBINERS[kind].at(target, place, updates)
    else:
        raise ValueError(f"mode is {kind!r}")


_COMBINERS: Mapping[str, np.ufunc] = {
    "add": np.add,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "sub": np.subtract,
}


def topk(
    x: Array,
    k: Array | int = 1,
    axis: Array | int = -1,
    ascending: Array | bool = False,
    sort: Array | bool = True,
    return_indices: Array | bool = True,
    output_indices_dtype: Array | None = None,
) -> tuple[Array, ...]:
    """The k largest or smallest along an axis and their places; of equal ones, the first."""
    place, count = int(axis), int(k)
    order = argsort(x, place, ascending)
    if count != -1:
        order = np.take(order, np.arange(count), place)
    if not sort:
        order = np.sort(order, place)
    values = np.take_along_axis(x, order, place)
    return (values, order) if return_indices else (values,)


def argsort(x: Array, axis: Array | int = -1, ascending: Array | bool = False) -> Array:
    """Indices in sorted order; the sort is stable."""
    place = int(axis)
    if ascending:
        return np.argsort(x, place, kind="stable")
    # Reversed before and after the sort, so that equal elements keep their order.
    backwards = np.flip(np.argsort(np.flip(x, place), place, kind="stable"), place)
    return x.shape[place] - 1 - backwards


INDEXING: Mapping[str, Callable[..., Array | tuple[Array, ...]]] = {
    function.__name__: function
    for function in (
        argsort,
        gather,
        gather_along_axis,
        gather_nd,
        scatter,
        scatter_along_axis,
        scatter_nd,
        topk,
    )
}
"""The function of each operator, by its name."""
