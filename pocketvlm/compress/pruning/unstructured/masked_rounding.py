"""What a group of columns keeps, chosen when error feedback reaches it.

A weight that is dropped costs w^2 / U_jj^2 of its value at that moment (SparseGPT, arXiv
2301.00774, equation 3). Each group drops what it would if the whole layer were compared at once
with the weights as they were, so that the count of the layer is met exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from pocketvlm.compress.layerwise.error_feedback import Factor, Rounding
from pocketvlm.compress.layerwise.hessian import InputHessian
from pocketvlm.compress.pruning.unstructured.patterns import (
    Blocked,
    Pattern,
    SemiStructured,
    keep_highest,
    select,
)
from pocketvlm.errors import CalibrationError

__all__ = [
    "Compare",
    "MaskedRounding",
    "check_compare",
    "columns_together",
    "count_groups",
    "layer_scores",
    "mask_columns",
    "score_removal",
]

Compare = Literal["rows", "layer"]
"""What competes: the elements of an output row, or those of the whole layer."""

_GROUP_COLUMNS = 32


def check_compare(compare: str) -> None:
    """Refuses an unknown comparison.

    Raises:
        ValueError: It is none of those that there are.
    """
    if compare not in get_args(Compare):
        raise ValueError(
            f"compare {compare!r} is unknown; allowed are {', '.join(get_args(Compare))}"
        )


def score_removal(weights: Tensor, pivots: Tensor, alive: Tensor) -> Tensor:
    """How much the loss of the output grows when a weight is dropped: w^2 / U_jj^2 (equation 3).

    Args:
        weights: [rows, columns].
        pivots: U_jj of every column, [columns].
        alive: Whether calibration excites a column, bool [columns]; others score 0.

    Raises:
        CalibrationError: A score is not finite.
    """
    scores = (weights.to(torch.float64) / pivots).square_().mul_(alive)
    if not bool(torch.isfinite(scores).all()):
        raise CalibrationError("what its weights are worth is not finite")
    return scores


def columns_together(pattern: Pattern) -> int:
    """Neighbouring columns that no border between groups may part."""
    if isinstance(pattern, SemiStructured):
        return pattern.of
    return pattern.columns if isinstance(pattern, Blocked) else 1


def mask_columns(pattern: Pattern, group_size: int | None = None) -> int:
    """Columns whose mask is chosen at a time: those of N:M, or whole blocks of about 32 columns.

    Args:
        pattern: Which elements may be dropped together.
        group_size: Columns of a group that they must divide; `None` for no groups.
    """
    together = columns_together(pattern)
    if isinstance(pattern, SemiStructured):
        return together
    count = math.ceil(_GROUP_COLUMNS / together)
    if group_size is None:
        return count * together
    whole = group_size // together
    return max(part for part in range(1, min(count, whole) + 1) if whole % part == 0) * together


def count_groups(
    scores: Tensor, pattern: Pattern, kept: int, compare: Compare, width: int
) -> tuple[Tensor, ...]:
    """How much every group of columns keeps, if the whole layer is compared by `scores`.

    Args:
        scores: [rows, columns].
        pattern: Which elements may be dropped together.
        kept: Elements that the layer keeps.
        compare: Within an output row, or over the whole layer.
        width: Columns of a group, a multiple of the pattern's.

    Returns:
        For each group how many candidates each of its sets keeps; see `_candidates`.
    """
    if compare == "layer" and not isinstance(pattern, SemiStructured):
        sets = _candidates(scores, pattern, compare)
        chosen = keep_highest(sets, torch.tensor([kept // pattern.elements]))
        mask = _as_mask(chosen, pattern, scores.shape)
    else:
        mask = select(scores, pattern, kept)
    return tuple(
        (_candidates(part.to(torch.float64), pattern, compare) > 0).sum(1)
        for part in mask.split(width, dim=1)
    )


class MaskedRounding:
    """A rounding that chooses what every few columns keep; the rest stands for exactly 0.

    Columns choose when the first of them is reached. What kept elements are rounded to has to be
    known for a whole group of the factor: it is found for a mask that the group would choose when
    it begins.

    Args:
        factor: Of the columns' Hessian.
        alive: Whether calibration excites a column, bool [columns].
        pattern: Which elements may be dropped together.
        compare: Within an output row, or over all rows.
        width: Columns that choose together; no group of the factor parts them.
        counts: What each `width` columns keep, from left to right.
        values: What kept elements are rounded to; `None` leaves them as they are.
    """

    def __init__(
        self,
        factor: Factor,
        alive: Tensor,
        pattern: Pattern,
        compare: Compare,
        width: int,
        counts: Sequence[Tensor],
        values: Rounding | None = None,
    ) -> None:
        order = factor.order
        self._spans = dict(zip(order.groups, pairwise(order.borders), strict=True))
        self._pivots, self._alive = factor.upper.diagonal(), alive[order.columns]
        self._columns, self._owners = order.columns, order.columns // width
        self._pattern, self._compare, self._counts = pattern, compare, counts
        self._values = values
        self._start = self._next = 0
        self._weights = torch.empty(0)
        self._keeps: dict[int, Tensor] = {}

    def enter_group(self, group: int, weights: Tensor, keeps: Tensor | None = None) -> None:
        """Remembers the group's weights, and lets grids be found for what it would keep now."""
        start, end = self._spans[group]
        self._weights, self._start = weights, start
        if self._values is None:
            return
        provisional = torch.empty(weights.shape, dtype=torch.bool)
        for owner in self._owners[start:end].unique().tolist():
            places, mask = self._choose(owner)
            provisional[places] = mask
        self._values.enter_group(group, weights, provisional)

    def round(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds what the next column keeps; without anything to round to, codes are values."""
        if self._next not in self._keeps:
            places, mask = self._choose(int(self._owners[self._next]))
            self._keeps |= dict(zip((places + self._start).tolist(), mask, strict=True))
        keeps = self._keeps[self._next]
        self._next += 1
        if self._values is None:
            kept = weights * keeps
            return kept, kept
        codes, decoded = self._values.round(weights)
        return codes, decoded.masked_fill(~keeps, 0.0)

    def _choose(self, owner: int) -> tuple[Tensor, Tensor]:
        """Places in the group of columns that choose together, and what they keep [columns, rows].

        A pattern means neighbours, so that columns are from left to right here, whatever the order
        in which they are rounded.
        """
        end = self._start + len(self._weights)
        places = (self._owners[self._start : end] == owner).nonzero()[:, 0]
        places = places[self._columns[self._start + places].argsort()]
        scores = score_removal(
            self._weights[places].T,
            self._pivots[self._start + places],
            self._alive[self._start + places],
        )
        sets = _candidates(scores, self._pattern, self._compare)
        chosen = keep_highest(sets, self._counts[owner])
        return places, _as_mask(chosen, self._pattern, scores.shape).T.contiguous()

    @property
    def mask(self) -> Tensor:
        """What was kept, bool [rows, columns] in their natural order."""
        placed = torch.stack([self._keeps[place] for place in range(len(self._columns))], dim=1)
        natural = torch.empty_like(placed)
        natural[:, self._columns] = placed
        return natural


def layer_scores(weights: Tensor, hessian: InputHessian, factors: Sequence[Factor]) -> Tensor:
    """`score_removal` of a whole layer before any update, float64 [rows, columns]."""
    alive = hessian.importance > 0
    scores = torch.empty(weights.shape, dtype=torch.float64)
    for part, factor in zip(hessian.slices, factors, strict=True):
        pivots = torch.empty(factor.upper.shape[0], dtype=torch.float64)
        pivots[factor.order.columns] = factor.upper.diagonal()
        scores[:, part] = score_removal(weights[:, part], pivots, alive[part])
    return scores


def _candidates(scores: Tensor, pattern: Pattern, compare: Compare) -> Tensor:
    """What competes with one another, [sets, candidates]: a block is one candidate."""
    if isinstance(pattern, SemiStructured):
        return scores.reshape(-1, pattern.of)
    if isinstance(pattern, Blocked):
        rows, columns = scores.shape
        high, wide = pattern.rows, pattern.columns
        scores = scores.reshape(rows // high, high, columns // wide, wide).sum(dim=(1, 3))
    return scores.reshape(1, -1) if compare == "layer" else scores


def _as_mask(chosen: Tensor, pattern: Pattern, shape: Sequence[int]) -> Tensor:
    """Undoes `_candidates`: bool [rows, columns]."""
    rows, columns = shape
    if not isinstance(pattern, Blocked):
        return chosen.reshape(rows, columns)
    blocks = chosen.reshape(rows // pattern.rows, columns // pattern.columns)
    return blocks.repeat_interleave(pattern.rows, dim=0).repeat_interleave(pattern.columns, dim=1)
