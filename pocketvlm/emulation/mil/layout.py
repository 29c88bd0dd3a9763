"""Operators that move elements independently of their values: shapes, slices, joins, fills.

Parameters are named and defaulted as in the operators' specification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pocketvlm.emulation.mil.types import Array

__all__ = ["LAYOUT", "slice_update_in_place"]


def reshape(x: Array, shape: Array) -> Array:
    """Another shape; 0 keeps a dimension and -1 is what remains."""
    sizes = [int(size) for size in shape]
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)])


def transpose(x: Array, perm: Array) -> Array:
    """Axes in another order."""
    return x.transpose([int(axis) for axis in perm])


def expand_dims(x: Array, axes: Array) -> Array:
    """New axes of one element."""
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


def squeeze(x: Array, axes: Array | None = None) -> Array:
    """Without some, or all, axes of one element."""
    return x.squeeze(None if axes is None else tuple(int(axis) for axis in axes))


def concat(values: Sequence[Array], axis: Array, interleave: Array | bool = False) -> Array:
    """Joined along an axis, one after the other or interleaved."""
    place = int(axis)
    if not interleave:
        return np.concatenate(values, place)
    place %= values[0].ndim
    stacked = np.stack(values, place + 1)
    shape = list(values[0].shape)
    shape[place] *= len(values)
    return stacked.reshape(shape)


def stack(values: Sequence[Array], axis: Array) -> Array:
    """Joined along a new axis."""
    return np.stack(values, int(axis))


def split(
    x: Array, axis: Array, num_splits: Array | None = None, split_sizes: Array | None = None
) -> tuple[Array, ...]:
    """Taken apart along an axis, in equal parts or parts of given sizes."""
    if split_sizes is not None:
        return tuple(np.split(x, np.cumsum(split_sizes)[:-1], int(axis)))
    if num_splits is None:
        raise ValueError("neither num_splits nor split_sizes is given")
    return tuple(np.split(x, int(num_splits), int(axis)))


def tile(x: Array, reps: Array) -> Array:
    """Repeated along each axis."""
    return np.tile(x, [int(times) for times in reps])


def pad(
    x: Array, pad: Array, mode: Array | None = None, constant_val: Array | float = 0.0
) -> Array:
    """Wider along the last axes."""
    widths = pad.reshape(-1, 2).tolist()
    widths = [[0, 0]] * (x.ndim - len(widths)) + widths
    kind = "constant" if mode is None else str(mode.item())
    if kind == "constant":
        return np.pad(x, widths, constant_values=np.asarray(constant_val, x.dtype))
    if kind == "reflect":
        return np.pad(x, widths, mode="reflect")
    if kind == "replicate":
        return np.pad(x, widths, mode="edge")
    raise ValueError(f"mode is {kind!r}")


def slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """`x[begin:end:stride]` along every axis; masks say where a bound is ignored."""
    return x[_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


def slice_by_size(x: Array, begin: Array, size: Array) -> Array:
    """`size` elements from `begin` along every axis; -1 is all that remain."""
    slices = []
    for first, count, there in zip(begin.tolist(), size.tolist(), x.shape, strict=True):
        start = first + there if first < 0 else first
        last = there if count == -1 else start + count
        if not 0 <= start <= last <= there:
            raise ValueError(f"{count} elements from {first} of {there}")
        slices.append(slice(start, last))
    return x[tuple(slices)]


def slice_update(
    x: Array,
    update: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """A copy of x with a slice replaced."""
    masks = (begin_mask, end_mask, squeeze_mask)
    return slice_update_in_place(x.copy(), update, begin, end, stride, *masks)


def slice_update_in_place(
    x: Array,
    update: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """The array x itself with a slice overwritten: for values that are no longer read."""
    place = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    target = x[place]
    if target.shape != update.shape:
        raise ValueError(
            f"an update of shape {list(update.shape)} for a slice of shape {list(target.shape)}: "
            f"begin {begin.tolist()}, end {end.tolist()}, x {list(x.shape)}"
        )
    x[place] = update
    return x


def _slices(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None,
    begin_mask: Array | None,
    end_mask: Array | None,
    squeeze_mask: Array | None,
) -> tuple[slice | int, ...]:
    def masked(mask: Array | None, axis: int) -> bool:
        return mask is not None and bool(mask[axis])

    places: list[slice | int] = []
    for axis in range(x.ndim):
        first = None if masked(begin_mask, axis) else int(begin[axis])
        if masked(squeeze_mask, axis):
            places.append(first or 0)
            continue
        last = None if masked(end_mask, axis) else int(end[axis])
        places.append(slice(first, last, None if stride is None else int(stride[axis])))
    return tuple(places)


def one_hot(
    indices: Array,
    one_hot_vector_size: Array,
    axis: Array | int = -1,
    on_value: Array | int = 1,
    off_value: Array | int = 0,
) -> Array:
    """A new axis with one value at each index and another elsewhere."""
    places = np.arange(int(one_hot_vector_size))
    hot = indices[..., None] == places
    return np.moveaxis(np.where(hot, on_value, off_value), -1, int(axis))


def range_1d(start: Array, end: Array, step: Array) -> Array:
    """From `start` to before `end`."""
    values: Array = np.arange(start.item(), end.item(), step.item())
    return values


def fill(shape: Array, value: Array | float = 0.0) -> Array:
    """One value everywhere."""
    return np.full([int(size) for size in shape], value)


def fill_like(ref_tensor: Array, value: Array | float = 0.0) -> Array:
    """One value everywhere, in the shape of another tensor."""
    return np.full(ref_tensor.shape, value)


def shape(x: Array) -> Array:
    """The shape."""
    return np.array(x.shape, np.int32)


def reverse(x: Array, axes: Array | None = None) -> Array:
    """Backwards along some, or all, axes."""
    return np.flip(x, None if axes is None else tuple(int(axis) for axis in axes))


def band_part(x: Array, lower: Array | int = -1, upper: Array | int = -1) -> Array:
    """The elements within that many diagonals of the main one; zero elsewhere."""
    rows, columns = np.arange(x.shape[-2])[:, None], np.arange(x.shape[-1])
    below, above = int(lower), int(upper)
    keep = np.ones(x.shape[-2:], bool)
    if below >= 0:
        keep &= rows - columns <= below
    if above >= 0:
        keep &= columns - rows <= above
    return np.where(keep, x, np.zeros((), x.dtype))


def cumsum(
    x: Array,
    axis: Array | int = 0,
    exclusive: Array | bool = False,
    reverse: Array | bool = False,
) -> Array:
    """Sums of everything up to each place."""
    place = int(axis)
    values = np.flip(x, place) if reverse else x
    sums = np.cumsum(values, place, dtype=x.dtype)
    if exclusive:
        sums = sums - values
    return np.flip(sums, place) if reverse else sums


def pixel_shuffle(x: Array, upscale_factor: Array) -> Array:
    """Channels to space: [n, c * f * f, h, w] to [n, c, h * f, w * f]."""
    f = int(upscale_factor)
    n, c, h, w = x.shape
    blocks = x.reshape(n, c // (f * f), f, f, h, w)
    return blocks.transpose(0, 1, 4, 2, 5, 3).reshape(n, c // (f * f), h * f, w * f)


def pixel_unshuffle(x: Array, downscale_factor: Array) -> Array:
    """Space to channels: [n, c, h * f, w * f] to [n, c * f * f, h, w]."""
    f = int(downscale_factor)
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // f, f, w // f, f)
    return blocks.transpose(0, 1, 3, 5, 2, 4).reshape(n, c * f * f, h // f, w // f)


LAYOUT: Mapping[str, Callable[..., Array | tuple[Array, ...]]] = {
    function.__name__: function
    for function in (
        band_part,
        concat,
        cumsum,
        expand_dims,
        fill,
        fill_like,
        one_hot,
        pad,
        pixel_shuffle,
        pixel_unshuffle,
        range_1d,
        reshape,
        reverse,
        shape,
        slice_by_index,
        slice_by_size,
        slice_update,
        split,
        squeeze,
        stack,
        tile,
        transpose,
    )
}
"""The function of each operator, by its name."""
