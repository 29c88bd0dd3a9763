"""Better tables for codes that are chosen: the least squares that k-means cannot see.

With codes fixed, the weight is linear in the entries of its tables, and the change of the layer's
output is a quadratic in them. GPTVQ (van Baalen et al., arXiv 2402.15319, section 3.3) descends its
gradient; conjugate gradients find its minimum in a few steps and need no rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pocketvlm.compress.quantization.codebook.rounding import (
    Table,
    decode_tables,
    flat_codes,
    row_pieces,
)

__all__ = ["Metric", "best_row_scales", "output_loss", "refine_tables"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Metric:
    """How much errors of a weight count.

    Attributes:
        slices: Columns of each diagonal block.
        hessians: Those blocks, float32.
    """

    slices: tuple[slice, ...]
    hessians: tuple[Tensor, ...]

    def times(self, values: Tensor) -> Tensor:
        """H V for V [columns, rows]."""
        parts = zip(self.slices, self.hessians, strict=True)
        return torch.cat([hessian @ values[part] for part, hessian in parts])

    @property
    def diagonal(self) -> Tensor:
        """Diagonal of H, [columns]."""
        return torch.cat([hessian.diagonal() for hessian in self.hessians])


def output_loss(errors: Tensor, metric: Metric, importance: Tensor) -> float:
    """tr(E^T H E) over rows weighted by their importance, for E [columns, rows]."""
    return float((errors * importance * metric.times(errors)).sum(dtype=torch.float64))


def refine_tables(
    tables: Sequence[Table],
    codes: Tensor,
    targets: Tensor,
    metric: Metric,
    importance: Tensor,
    *,
    keeps: Tensor | None = None,
    steps: int = 6,
    tolerance: float = 1e-4,
) -> tuple[Table, ...]:
    """Moves all entries together towards the least change of the layer's output.

    Args:
        tables: Where the descent starts.
        codes: What the columns were rounded to, [columns, codes per column].
        targets: float32 [columns, rows].
        metric: How much errors count across columns.
        importance: How much errors in each row count, [rows].
        keeps: Which elements a mask keeps, bool [columns, rows]: an entry has no part in the
            others, whatever their codes; `None` for all.
        steps: Of conjugate gradients at most, with the diagonal as preconditioner.
        tolerance: Stops after a step that gains less than this share of the loss: vectors mostly
            need two or three steps, sums of two tables all, and products with the Hessian are
            most of the cost.

    Returns:
        Tables rounded to float16; entries that no code names stay as they are.
    """
    losses: list[float] = []

    def weigh_errors(rows: slice, decoded: Tensor) -> Tensor:
        errors = decoded - targets[:, rows]
        pulled = metric.times(errors) * importance[rows]
        losses.append(float((errors * pulled).sum(dtype=torch.float64)))
        return pulled

    def weigh_change(rows: slice, decoded: Tensor) -> Tensor:
        return metric.times(decoded) * importance[rows]

    def weigh_places(rows: slice, _: Tensor) -> Tensor:
        return metric.diagonal[:, None] * importance[rows]

    places = _Places(tables, codes, targets.shape[1], keeps)
    inverse = [torch.where(part > 0, 1 / part, 0.0) for part in places.sums(tables, weigh_places)]
    residual = [-part for part in places.sums(tables, weigh_errors)]
    loss = sum(losses)
    moved = [torch.zeros_like(part) for part in residual]
    scaled = [part * by for part, by in zip(residual, inverse, strict=True)]
    direction = scaled
    energy = _inner(residual, scaled)
    for _ in range(steps):
        if not energy > 0:
            break
        turned = places.sums(_with_books(tables, direction), weigh_change)
        curvature = _inner(direction, turned)
        if not curvature > 0:
            break
        length = energy / curvature
        moved = [a + length * b for a, b in zip(moved, direction, strict=True)]
        gain = length * energy
        loss -= gain
        if gain < tolerance * loss:
            break
        residual = [a - length * b for a, b in zip(residual, turned, strict=True)]
        scaled = [part * by for part, by in zip(residual, inverse, strict=True)]
        energy, before = _inner(residual, scaled), energy
        direction = [a + energy / before * b for a, b in zip(scaled, direction, strict=True)]
    books = [
        (book.reshape(-1, book.shape[2]) + step).to(torch.float16).to(torch.float32)
        for book, step in zip(_books(tables), moved, strict=True)
    ]
    return _with_books(tables, books)


def best_row_scales(decoded: Tensor, weights: Tensor, metric: Metric) -> Tensor:
    """The scale of every row that changes the output least: q H w / q H q.

    Args:
        decoded: Q, before scales, [columns, rows].
        weights: W, [columns, rows].
        metric: How much errors count across columns.

    Returns:
        float32 [rows]; NaN where the row's codes stand for nothing.
    """
    turned = metric.times(decoded)
    return (turned * weights).sum(0) / (turned * decoded).sum(0)


def _books(tables: Sequence[Table]) -> list[Tensor]:
    return [book for table in tables for book in table.books]


def _with_books(tables: Sequence[Table], flat: Sequence[Tensor]) -> tuple[Table, ...]:
    """The tables with other entries, given as [entries of all groups, d]."""
    left = iter(flat)
    changed = []
    for table in tables:
        first = next(left).view(table.first.shape).to(torch.float32)
        second = None
        if table.second is not None:
            second = next(left).view(table.second.shape).to(torch.float32)
        changed.append(replace(table, first=first, second=second))
    return tuple(changed)


@dataclass(frozen=True, eq=False)
class _Places:
    """Where the entries of tables stand in a weight, which is gone through in pieces of rows."""

    tables: Sequence[Table]
    codes: Tensor
    rows: int
    keeps: Tensor | None

    def sums(
        self, tables: Sequence[Table], weigh: Callable[[slice, Tensor], Tensor]
    ) -> list[Tensor]:
        """Sums, over the places of every entry, of what is made of some rows as tables have them.

        Args:
            tables: Of the same codes, perhaps with other entries.
            weigh: Makes [columns, rows] of the rows and of what their codes stand for.
        """
        totals: list[Tensor] = []
        for rows, cut in row_pieces(self.tables, self.codes.shape[0], self.rows):
            codes = self.codes[:, cut]
            keeps = None if self.keeps is None else self.keeps[:, rows]
            count = rows.stop - rows.start
            values = weigh(rows, decode_tables(tables, codes, count, keeps))
            sums = _gather_sums(tables, codes, values, count, keeps)
            totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
        return totals


def _gather_sums(
    tables: Sequence[Table], codes: Tensor, values: Tensor, rows: int, keeps: Tensor | None
) -> list[Tensor]:
    """Sums of values [columns, rows] over the places of every entry, float64 [entries, d] a book.

    What a mask drops is not a place of any entry. `bincount` adds one after another: the order
    never depends on threads.
    """
    if keeps is not None:
        values = values.masked_fill(~keeps, 0.0)
    sums = []
    for table in tables:
        flat, books = flat_codes(table, codes, rows)
        for index, book in zip(flat, books, strict=True):
            length = book.shape[1]
            own = values[table.columns].view(-1, length)
            parts = [
                torch.bincount(
                    index.reshape(-1),
                    weights=own[:, place].to(torch.float64),
                    minlength=book.shape[0],
                )
                for place in range(length)
            ]
            sums.append(torch.stack(parts, dim=1))
    return sums


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return float(sum((a * b).sum() for a, b in zip(left, right, strict=True)))
