"""GPTQ's kernel: round one column at a time and let the columns to come make up for its error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323, algorithm 1, in float64 throughout. Three things differ from common code:

* A group's grid is made from weights that carry *all* error updates so far, also where a group is
  narrower than the lazy-update block (block borders are placed on group borders for that).
* Columns are ordered within groups, and groups among each other, so that codes and scales come
  back in their own places and no runtime needs to gather ("group-aware" order).
* A column that calibration never excites is rounded, not zeroed: a picture may excite it yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

__all__ = [
    "ORDERS",
    "ColumnOrder",
    "Factor",
    "Order",
    "Rounding",
    "factorize",
    "order_columns",
    "quantize_with_feedback",
]

Order = Literal["group_aware", "natural"]
ORDERS: tuple[Order, ...] = ("group_aware", "natural")

_BLOCK = 128
_PIECE = 512
_MAX_DAMPING = 1.0
_LEAST_DAMPING = 1e-4


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnOrder:
    """In which order columns are rounded; every group stays in one piece.

    Attributes:
        columns: Permutation of the columns, int64 [columns].
        groups: Groups in order of processing.
        borders: First position of each group in `columns`, and the end: one more than groups.
    """

    columns: Tensor
    groups: tuple[int, ...]
    borders: tuple[int, ...]

    def split(self, values: Tensor) -> dict[int, Tensor]:
        """Values of columns, [columns], as each group sees them in processing order."""
        placed = values[self.columns]
        pieces = pairwise(self.borders)
        return {
            group: placed[start:end]
            for group, (start, end) in zip(self.groups, pieces, strict=True)
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Factor:
    """What error feedback needs of a Hessian.

    Attributes:
        upper: U with H^-1 = U^T U, columns in processing order, float64 [columns, columns].
        order: The processing order.
        damping: Share of the mean diagonal that was added; more than asked for where the Cholesky
            factorization failed with less.
        dead: Columns that calibration never excited.
    """

    upper: Tensor
    order: ColumnOrder
    damping: float
    dead: int


def order_columns(diagonal: Tensor, group_size: int, order: Order) -> ColumnOrder:
    """Orders columns by how strongly they are excited, group by group.

    Args:
        diagonal: Diagonal of the Hessian, [columns].
        group_size: Columns of a group; the last may be narrower.
        order: `group_aware` starts with the group that holds the largest entry, and with the
            largest entry within each; `natural` goes from left to right.
    """
    pieces = diagonal.split(group_size)
    groups = list(range(len(pieces)))
    if order == "group_aware":
        peaks = torch.stack([piece.max() for piece in pieces])
        groups = torch.argsort(peaks, descending=True, stable=True).tolist()
    columns, borders = [], [0]
    for group in groups:
        piece = pieces[group]
        within = torch.arange(piece.shape[0], device=piece.device)
        if order == "group_aware":
            within = torch.argsort(piece, descending=True, stable=True)
        columns.append(group * group_size + within)
        borders.append(borders[-1] + piece.shape[0])
    return ColumnOrder(columns=torch.cat(columns), groups=tuple(groups), borders=tuple(borders))


def factorize(hessian: Tensor, *, group_size: int, damping: float, order: Order) -> Factor | None:
    """Damps, orders and factorizes a Hessian.

    H = R R^T for an upper triangular R gives H^-1 = U^T U with U = R^-1: one factorization and
    one triangular inverse; H^-1 is never formed.

    Args:
        hessian: Symmetric [columns, columns].
        group_size: Columns of a group.
        damping: Share of the mean diagonal of excited columns that is added to the diagonal.
        order: Processing order.

    Returns:
        The factor, or `None` where the factorization fails even with the strongest damping.

    Raises:
        ValueError: The Hessian holds values that are not finite.
    """
    diagonal = hessian.diagonal().to(torch.float64)
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the Hessian holds values that are not finite")
    alive = diagonal > 0
    dead = int((~alive).sum())
    mean = float(diagonal[alive].mean()) if dead < diagonal.shape[0] else 1.0
    placed = order_columns(diagonal, group_size, order)
    used = damping
    while True:
        damped = _ordered(hessian, placed.columns)
        # A dead column has no ties to others; any value on its diagonal makes it round to nearest.
        damped.diagonal()[~alive[placed.columns]] = mean
        damped.diagonal().add_(used * mean)
        if _factorize_in_place(damped):
            break
        if used >= _MAX_DAMPING:
            return None
        used = min(_MAX_DAMPING, max(10 * used, _LEAST_DAMPING))
    _invert_in_place(damped)
    return Factor(upper=damped, order=placed, damping=used, dead=dead)


class Rounding(Protocol):
    """Rounds one column at a time; whatever a target can store is one of these."""

    def enter_group(self, group: int, weights: Tensor, keeps: Tensor | None = None) -> None:
        """A new group of columns begins.

        Args:
            group: Its number, from left to right.
            weights: The group's weights with the errors of all columns before them,
                [columns, rows], columns in processing order. A view, to which the errors of the
                group's own columns are added as they are rounded.
            keeps: Which of them a mask keeps, bool [columns, rows]; `None` for all.
        """

    def round(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds a column of the current group.

        Args:
            weights: [rows].

        Returns:
            Codes, of any length, and what they stand for, [rows] in the type of the weights.
        """


def quantize_with_feedback(
    weights: Tensor, factor: Factor, rounding: Rounding, keeps: Tensor | None = None
) -> Tensor:
    """Rounds rows of a weight against a Hessian.

    An element that a mask drops is rounded to exactly 0, whatever its code, and the columns to come
    make up for that as for any other error.

    Args:
        weights: float64 [rows, columns].
        factor: Of the columns' Hessian.
        rounding: What every column is rounded to.
        keeps: Which elements a mask keeps, bool [rows, columns]; `None` for all.

    Returns:
        The codes of every column, columns in their natural order, [columns, codes per column].

    Raises:
        ValueError: A group's range is too large for a float16 scale.
    """
    order = factor.order
    # One column is one contiguous row from here on.
    W = weights[:, order.columns].T.contiguous()
    kept = None if keeps is None else keeps[:, order.columns].T.contiguous()
    group_at = dict(zip(order.borders[:-1], order.groups, strict=True))
    ends = dict(pairwise(order.borders))
    codes: list[Tensor] = []
    for start, end in _blocks(order.borders):
        U = factor.upper[start:end, start:end]
        errors = W.new_empty(end - start, W.shape[1])
        for column in range(start, end):
            if column in ends:
                group = slice(column, ends[column])
                rounding.enter_group(
                    group_at[column], W[group], None if kept is None else kept[group]
                )
            place = column - start
            chosen, decoded = rounding.round(W[column])
            if kept is not None:
                decoded = decoded.masked_fill(~kept[column], 0.0)
            error = torch.sub(W[column], decoded, out=errors[place]).div_(U[place, place])
            W[column + 1 : end].addr_(U[place, place + 1 :], error, alpha=-1)
            codes.append(chosen)
        W[end:].addmm_(factor.upper[start:end, end:].T, errors, alpha=-1)
    placed = torch.stack(codes)
    natural = torch.empty_like(placed)
    natural[order.columns] = placed
    return natural


# What follows works in place and in pieces: a wide Hessian in float64 is what bounds the stage's
# memory, and LAPACK's own routines would hold it three times.


def _ordered(hessian: Tensor, columns: Tensor) -> Tensor:
    """Rows and columns of a matrix in another order, in float64."""
    ordered = torch.empty(hessian.shape, dtype=torch.float64, device=hessian.device)
    for piece, rows in zip(ordered.split(_PIECE), columns.split(_PIECE), strict=True):
        piece.copy_(hessian[rows][:, columns])
    return ordered


def _factorize_in_place(matrix: Tensor) -> bool:
    """Overwrites a symmetric matrix by the upper triangular R with R R^T = matrix.

    Starts in the last corner, where P A P = L L^T for the reversal P gives R = P L P. Below the
    blocks of the diagonal nothing is read or written.

    Returns:
        Whether the matrix is positive definite; if not, its content is of no use.
    """
    for start in reversed(range(0, matrix.shape[0], _PIECE)):
        end = min(start + _PIECE, matrix.shape[0])
        lower, failed = torch.linalg.cholesky_ex(matrix[start:end, start:end].flip(0, 1))
        if int(failed):
            return False
        corner = lower.flip(0, 1)
        matrix[start:end, start:end] = corner
        panel = matrix[:start, start:end]
        panel.copy_(torch.linalg.solve_triangular(corner.T, panel, upper=False, left=False))
        for first in range(0, start, _PIECE):
            last = first + _PIECE
            matrix[:last, first:last].addmm_(panel[:last], panel[first:last].T, alpha=-1)
    return True


def _invert_in_place(upper: Tensor) -> None:
    """Overwrites an upper triangular matrix by its inverse; whatever lies below becomes zero."""
    for start in range(0, upper.shape[0], _PIECE):
        end = min(start + _PIECE, upper.shape[0])
        unit = torch.eye(end - start, dtype=upper.dtype, device=upper.device)
        corner = torch.linalg.solve_triangular(upper[start:end, start:end], unit, upper=True)
        above = upper[:start, start:end] @ corner
        upper[:start, start:end] = -(upper[:start, :start] @ above)
        upper[start:end, start:end] = corner
        upper[end:, start:end] = 0


def _blocks(borders: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Lazy-update blocks: whole groups up to 128 columns, or pieces of one wider group."""
    start = 0
    for first, last in pairwise(borders):
        if last - start > _BLOCK and first > start:
            yield start, first
            start = first
        while last - start > _BLOCK:
            yield start, start + _BLOCK
            start += _BLOCK
    if start < borders[-1]:
        yield start, borders[-1]
