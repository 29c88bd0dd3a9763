"""Group-wise affine grids: which integers a group of weights is rounded to.

Pure functions over [..., group] tensors of any float type. A scale is rounded to float16 before
any code is chosen against it, so codes are optimal for the scale that is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pocketvlm.weights import AffineWeight, pack_codes

__all__ = [
    "GRIDS",
    "Grid",
    "GridKind",
    "affine_form",
    "decode",
    "encode",
    "group_columns",
    "min_max_grid",
    "mse_grid",
]

GridKind = Literal["min_max", "mse"]

# Shares of the min-max range that the squared-error search tries.
_SHRINK = tuple(1 - step / 40 for step in range(25))


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Scale and zero point of every group: a code c stands for scale * (c - zero).

    Attributes:
        scale: Positive, exact in float16, [...].
        zero: Integers from 0 to 2**bits - 1, in the type of the weights, [...].
        bits: Width of a code.
    """

    scale: Tensor
    zero: Tensor
    bits: int


GridFunction = Callable[..., Grid]


def min_max_grid(weights: Tensor, bits: int, *, symmetric: bool) -> Grid:
    """The grid that spans a group's range, zero included, so that zero is exact.

    The symmetric grid has its zero point at 2**(bits - 1) and spans twice the largest magnitude:
    no weight lies further than half a step from it.

    Args:
        weights: [..., group].
        bits: Width of a code.
        symmetric: Whether the zero point is fixed.

    Raises:
        ValueError: A range is too large for a float16 scale.
    """
    low, high = _range(weights)
    return _grid(low, high, bits, symmetric=symmetric)


def mse_grid(weights: Tensor, bits: int, *, symmetric: bool) -> Grid:
    """The shrunk min-max grid with the smallest squared error (GPTQ's own `mse` option).

    Clips the few largest weights of a group where that serves the others better. Ties go to the
    wider grid.

    Args:
        weights: [..., group].
        bits: Width of a code.
        symmetric: Whether the zero point is fixed.

    Raises:
        ValueError: A range is too large for a float16 scale.
    """
    low, high = _range(weights)
    best = _grid(low, high, bits, symmetric=symmetric)
    least = _squared_error(weights, best)
    for share in _SHRINK[1:]:
        tried = _grid(low * share, high * share, bits, symmetric=symmetric)
        error = _squared_error(weights, tried)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(
            scale=torch.where(better, tried.scale, best.scale),
            zero=torch.where(better, tried.zero, best.zero),
            bits=bits,
        )
    return best


GRIDS: dict[GridKind, GridFunction] = {"min_max": min_max_grid, "mse": mse_grid}


def encode(weights: Tensor, grid: Grid) -> Tensor:
    """The nearest code of every weight [..., group], in the type of the weights."""
    steps = torch.round(weights / grid.scale[..., None])
    return (steps + grid.zero[..., None]).clamp_(0, (1 << grid.bits) - 1)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """What codes [..., group] stand for."""
    return (codes - grid.zero[..., None]) * grid.scale[..., None]


def group_columns(weights: Tensor, group_size: int) -> Tensor:
    """Splits [rows, columns] into [rows, groups, group_size]; the last group is padded with zero.

    Zero is exact on every grid and inside every range, so padding changes no other code.
    """
    missing = -weights.shape[-1] % group_size
    return functional.pad(weights, (0, missing)).view(weights.shape[0], -1, group_size)


def affine_form(
    codes: Tensor, grid: Grid, *, group_size: int, in_features: int, symmetric: bool
) -> AffineWeight:
    """The stored form of codes [rows, groups * group_size] and a grid [rows, groups]."""
    # Row by row in pieces: packing odd widths needs room for every single bit.
    packed = [
        torch.from_numpy(pack_codes(piece.to(torch.uint8).numpy(), grid.bits))
        for piece in codes.split(4096)
    ]
    return AffineWeight(
        packed=torch.cat(packed),
        scales=grid.scale.to(torch.float16),
        zeros=None if symmetric else grid.zero.to(torch.uint8),
        bits=grid.bits,
        group_size=group_size,
        in_features=in_features,
    )


def _range(weights: Tensor) -> tuple[Tensor, Tensor]:
    return weights.amin(dim=-1).clamp(max=0), weights.amax(dim=-1).clamp(min=0)


def _grid(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> Grid:
    largest = (1 << bits) - 1
    span = 2 * torch.maximum(-low, high) if symmetric else high - low
    scale = (span / largest).to(torch.float16).to(span.dtype)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"weights that span {float(span.max()):.3g} have no float16 scale")
    # A group of zeros, or of less than float16 can tell from zero: any scale means zero.
    scale = torch.where(scale > 0, scale, 1.0)
    if symmetric:
        zero = torch.full_like(scale, 1 << (bits - 1))
    else:
        zero = torch.round(-low / scale).clamp_(0, largest)
    return Grid(scale=scale, zero=zero, bits=bits)


def _squared_error(weights: Tensor, grid: Grid) -> Tensor:
    return (decode(encode(weights, grid), grid) - weights).square_().sum(dim=-1)
