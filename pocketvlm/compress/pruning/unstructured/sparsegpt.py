"""SparseGPT: weights go where the others can make up for them, and the others do.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
arXiv 2301.00774, algorithm 1. Columns are visited one after another; a weight that is dropped
leaves the error w / U_jj, which the columns to come take up, exactly as GPTQ's rounding errors are:
the kernel is `error_feedback`, and dropping is one more rounding. U is the upper Cholesky factor of
the damped inverse Hessian. A group of columns chooses what it keeps when it is reached, by
w^2 / U_jj^2 of its weights as they then are. What differs from the paper and its code:

* Their groups of 128 columns each drop the same share, over all rows. Here a group drops what it
  would if the whole layer were compared at once with the weights as they were: `compare: rows`
  within every output row, `layer` over all rows. Either meets the count of the layer exactly.
* Groups are 32 columns wide: a choice that sees more of the errors before it is a better one, and
  shares that follow the scores make narrow groups safe. Measured in docs/methods/sparsegpt.md.
* A column that calibration never excites scores 0 and goes first, but its weights are not erased
  beyond the layer's count.
* Everything is float64; a failed factorization is tried again with more damping, and reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from pocketvlm.calibration.walk.walk import InputMoments
from pocketvlm.compress.layerwise.error_feedback import (
    Factor,
    Rounding,
    quantize_with_feedback,
)
from pocketvlm.compress.layerwise.hessian import InputHessian, weigh_moments
from pocketvlm.compress.pruning.unstructured.patterns import (
    Blocked,
    Pattern,
    SemiStructured,
    keep_highest,
    select,
)
from pocketvlm.compress.pruning.unstructured.score import (
    Pruned,
    PruningScore,
    PruningTask,
    prune_by_score,
)
from pocketvlm.compress.pruning.unstructured.wanda import score_wanda
from pocketvlm.errors import CalibrationError
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.sparse import SparseWeight

__all__ = [
    "Compare",
    "MaskedRounding",
    "SparseGpt",
    "check_compare",
    "columns_together",
    "count_groups",
    "layer_scores",
    "mask_columns",
    "prune_with_feedback",
    "score_removal",
]

Compare = Literal["rows", "layer"]

_GROUP_COLUMNS = 32
_NOT_POSITIVE = (
    "the Cholesky factorization failed at every damping up to 1: its mask is Wanda's, and nothing "
    "makes up for what is dropped"
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


def prune_with_feedback(
    weights: Tensor,
    evidence: InputHessian,
    factors: Sequence[Factor],
    pattern: Pattern,
    kept: int,
    *,
    compare: Compare,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Prunes a weight against the Hessian of its input.

    Args:
        weights: float64 [rows, columns].
        evidence: Of the input.
        factors: One a diagonal block, in groups of `width`.
        pattern: Which elements may be dropped together.
        kept: Elements that are kept.
        compare: Within an output row, or over the whole layer.
        width: Columns that choose together.

    Returns:
        What is kept, bool, and the weight with the updates of what is kept, 0 elsewhere;
        [rows, columns] both.

    Raises:
        CalibrationError: A score is not finite.
    """
    alive = evidence.importance > 0
    counts = count_groups(layer_scores(weights, evidence, factors), pattern, kept, compare, width)
    values, mask = torch.empty_like(weights), torch.empty(weights.shape, dtype=torch.bool)
    for part, factor in zip(evidence.slices, factors, strict=True):
        first = part.start // width
        rounding = MaskedRounding(factor, alive[part], pattern, compare, width, counts[first:])
        values[:, part] = quantize_with_feedback(weights[:, part], factor, rounding).T
        mask[:, part] = rounding.mask
    return mask, values


def layer_scores(weights: Tensor, evidence: InputHessian, factors: Sequence[Factor]) -> Tensor:
    """`score_removal` of a whole layer before any update, float64 [rows, columns]."""
    alive = evidence.importance > 0
    scores = torch.empty(weights.shape, dtype=torch.float64)
    for part, factor in zip(evidence.slices, factors, strict=True):
        pivots = torch.empty(factor.upper.shape[0], dtype=torch.float64)
        pivots[factor.order.columns] = factor.upper.diagonal()
        scores[:, part] = score_removal(weights[:, part], pivots, alive[part])
    return scores


@dataclass(frozen=True, kw_only=True)
class SparseGpt(PruningScore):
    """Drops weights and lets those that stay make up for it (arXiv 2301.00774).

    Attributes:
        compare: `rows` keeps as much of every output row, `layer` compares all rows of a layer.
        damping: Share of a Hessian's mean diagonal that is added to it; raised tenfold, and
            reported, where the factorization fails.
    """

    kind: Literal["sparsegpt"] = "sparsegpt"
    compare: Compare = "rows"
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_compare(self.compare)
        if not 0 <= self.damping <= 1:
            raise ValueError(f"damping must lie between 0 and 1, not {self.damping}")

    def weigh(self, moments: InputMoments, pattern: Pattern) -> InputHessian:
        """Factors of the input's Hessian, in the groups of columns that choose together."""
        return weigh_moments(
            moments, (mask_columns(pattern),), damping=self.damping, order="natural"
        )

    def prune(self, task: PruningTask, weight: WeightForm, evidence: InputHessian | None) -> Pruned:
        """Drops weights, and updates those that stay."""
        if evidence is None:
            raise TypeError("SparseGPT needs its layers' inputs")
        dense = weight.dequantize().to(torch.float64)
        width = mask_columns(task.pattern)
        found = evidence.factors[width]
        factors = [factor for factor in found if factor is not None]
        if len(factors) < len(found):
            scores = score_wanda(dense, evidence.importance)
            return prune_by_score(task, weight, scores, {"reason": _NOT_POSITIVE})
        mask, values = prune_with_feedback(
            dense,
            evidence,
            factors,
            task.pattern,
            task.kept,
            compare=self.compare,
            width=width,
        )
        damping = max(factor.damping for factor in factors)
        return Pruned(
            mask=mask,
            form=SparseWeight.from_form(DenseWeight(values=values), mask),
            figures={"damping": damping, "damping_raised": damping > evidence.damping},
        )


def check_compare(compare: str) -> None:
    """Refuses an unknown comparison.

    Raises:
        ValueError: It is none of those that there are.
    """
    if compare not in get_args(Compare):
        raise ValueError(
            f"compare {compare!r} is unknown; allowed are {', '.join(get_args(Compare))}"
        )


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
