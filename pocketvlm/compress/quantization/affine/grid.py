"""Group-wise affine grids: which integers a group of weights is rounded to.

Pure functions over [..., group] tensors of any float type. A scale is rounded to float16 before
any code is chosen against it, so codes are optimal for the scale that is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.bitpack import pack_codes

__all__ = [
    "GRIDS",
    "AffineScheme",
    "Grid",
    "GridKind",
    "affine_form",
    "check_grid",
    "decode",
    "encode",
    "group_columns",
    "min_max_grid",
    "mse_grid",
]

GridKind = Literal["min_max", "mse"]

# Shares of the min-max range that the squared-error search tries.
_SHRINK = tuple(1 - step / 40 for step in range(25))
# A group with a float zero point spans at least this share of its largest magnitude.
_NARROWEST = 16


@dataclass(frozen=True, kw_only=True)
class AffineScheme:
    """The kind of a grid.

    Attributes:
        bits: Width of a code.
        symmetric: Whether the zero point is fixed at 2**(bits - 1).
        restricted: Whether a symmetric grid leaves out code 0, so that it reaches equally far to
            both sides: [-7, 7] for 4 bits.
        float_zeros: Whether a zero point may lie between codes.
    """

    bits: int
    symmetric: bool = False
    restricted: bool = False
    float_zeros: bool = False

    @property
    def lowest(self) -> int:
        """The lowest code that is used."""
        return int(self.restricted)

    @property
    def highest(self) -> int:
        """The highest code that is used."""
        return (1 << self.bits) - 1

    @property
    def label(self) -> str:
        """The grid in a report."""
        if self.symmetric:
            return "symmetric, restricted" if self.restricted else "symmetric"
        return "asymmetric, float zeros" if self.float_zeros else "asymmetric"


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Scale and zero point of every group: a code c stands for scale * (c - zero).

    Attributes:
        scale: Positive, exact in float16, [...].
        zero: Zero points in the type of the weights, [...]: integers from 0 to 2**bits - 1, or any
            value that is exact in float16 where the scheme has float zeros.
        scheme: The kind of grid.
    """

    scale: Tensor
    zero: Tensor
    scheme: AffineScheme


class GridFunction(Protocol):
    """How the grid of each group is found."""

    def __call__(
        self,
        weights: Tensor,
        scheme: AffineScheme,
        importance: Tensor | None = None,
        keeps: Tensor | None = None,
    ) -> Grid:
        """Finds the grids of weights [..., group].

        Args:
            weights: [..., group].
            scheme: The kind of grid.
            importance: How much an error of a column counts, broadcast to the weights; `None` for
                all alike.
            keeps: Which weights a mask keeps, bool [..., group]: the others take no code, so that
                no grid reaches for them; `None` for all.
        """


def min_max_grid(
    weights: Tensor,
    scheme: AffineScheme,
    importance: Tensor | None = None,  # noqa: ARG001  (a `GridFunction`; nothing is weighed here)
    keeps: Tensor | None = None,
) -> Grid:
    """The grid that spans a group's range, zero included unless zero points are floats.

    The symmetric grid has its zero point at 2**(bits - 1) and spans twice the largest magnitude:
    no weight lies further than half a step from it.

    Raises:
        ValueError: A range is too large for a float16 scale.
    """
    return _grid(*_range(weights, scheme, keeps), scheme)


def mse_grid(
    weights: Tensor,
    scheme: AffineScheme,
    importance: Tensor | None = None,
    keeps: Tensor | None = None,
) -> Grid:
    """The shrunk min-max grid with the smallest weighted squared error (GPTQ's `mse` option).

    Clips the few largest weights of a group where that serves the others better. Ties go to the
    wider grid. With the Hessian's diagonal as importance the search knows which columns matter.

    Raises:
        ValueError: A range is too large for a float16 scale.
    """
    low, high = _range(weights, scheme, keeps)
    best = _grid(low, high, scheme)
    least = _squared_error(weights, best, importance, keeps)
    middle = (low + high) / 2 if scheme.float_zeros else torch.zeros_like(low)
    for share in _SHRINK[1:]:
        tried = _grid(middle + (low - middle) * share, middle + (high - middle) * share, scheme)
        error = _squared_error(weights, tried, importance, keeps)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(
            scale=torch.where(better, tried.scale, best.scale),
            zero=torch.where(better, tried.zero, best.zero),
            scheme=scheme,
        )
    return best


GRIDS: dict[GridKind, GridFunction] = {"min_max": min_max_grid, "mse": mse_grid}


def check_grid(kind: str) -> None:
    """Refuses an unknown way to find grids.

    Raises:
        ValueError: It is none of those that there are.
    """
    if kind not in GRIDS:
        raise ValueError(f"grid {kind!r} is unknown; allowed are {', '.join(GRIDS)}")


def encode(weights: Tensor, grid: Grid) -> Tensor:
    """The nearest code of every weight [..., group], in the type of the weights."""
    steps = weights / grid.scale[..., None]
    if grid.scheme.float_zeros:
        codes = torch.round(steps + grid.zero[..., None])
    else:
        codes = torch.round(steps) + grid.zero[..., None]
    return codes.clamp_(grid.scheme.lowest, grid.scheme.highest)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """What codes [..., group] stand for."""
    return (codes - grid.zero[..., None]) * grid.scale[..., None]


def group_columns(weights: Tensor, group_size: int) -> Tensor:
    """Splits [rows, columns] into [rows, groups, group_size]; the last group is padded with zero.

    Zero is exact on every grid and inside every range, so padding changes no other code. A mask is
    padded with false.
    """
    missing = -weights.shape[-1] % group_size
    return functional.pad(weights, (0, missing)).view(weights.shape[0], -1, group_size)


def affine_form(codes: Tensor, grid: Grid, *, group_size: int, in_features: int) -> AffineWeight:
    """The stored form of codes [rows, groups * group_size] and a grid [rows, groups].

    It lies in main memory, wherever they were computed.
    """
    scheme = grid.scheme
    zeros: Tensor | None = None
    if not scheme.symmetric:
        zeros = grid.zero.to(torch.float16 if scheme.float_zeros else torch.uint8).cpu()
    # Row by row in pieces: packing odd widths needs room for every single bit.
    packed = [
        torch.from_numpy(pack_codes(piece.to(torch.uint8).cpu().numpy(), scheme.bits))
        for piece in codes.split(4096)
    ]
    return AffineWeight(
        packed=torch.cat(packed),
        scales=grid.scale.to(torch.float16).cpu(),
        zeros=zeros,
        bits=scheme.bits,
        group_size=group_size,
        in_features=in_features,
    )


def _range(
    weights: Tensor, scheme: AffineScheme, keeps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if keeps is None:
        low, high = weights.amin(dim=-1), weights.amax(dim=-1)
    else:
        is_empty = ~keeps.any(dim=-1)
        low = weights.masked_fill(~keeps, torch.inf).amin(dim=-1).masked_fill(is_empty, 0.0)
        high = weights.masked_fill(~keeps, -torch.inf).amax(dim=-1).masked_fill(is_empty, 0.0)
    below, above = low.clamp(max=0), high.clamp(min=0)
    if not scheme.float_zeros:
        return below, above  # zero stays exact on a grid whose zero point is a code
    # A narrow group far from zero would need a zero point that float16 cannot tell from others.
    is_narrow = (high - low) * _NARROWEST < torch.maximum(-below, above)
    return torch.where(is_narrow, below, low), torch.where(is_narrow, above, high)


def _grid(low: Tensor, high: Tensor, scheme: AffineScheme) -> Grid:
    largest = (1 << scheme.bits) - 1
    span = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    steps = largest - 1 if scheme.restricted else largest
    scale = (span / steps).to(torch.float16).to(span.dtype)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"weights that span {float(span.max()):.3g} have no float16 scale")
    # A group of zeros, or of less than float16 can tell from zero: any scale means zero.
    scale = torch.where(scale > 0, scale, 1.0)
    if scheme.symmetric:
        zero = torch.full_like(scale, 1 << (scheme.bits - 1))
    elif scheme.float_zeros:
        zero = (-low / scale).to(torch.float16).to(span.dtype)
    else:
        zero = torch.round(-low / scale).clamp_(0, largest)
    return Grid(scale=scale, zero=zero, scheme=scheme)


def _squared_error(
    weights: Tensor, grid: Grid, importance: Tensor | None, keeps: Tensor | None
) -> Tensor:
    errors = (decode(encode(weights, grid), grid) - weights).square_()
    if importance is not None:
        errors *= importance
    if keeps is not None:
        errors.masked_fill_(~keeps, 0.0)
    return errors.sum(dim=-1)
