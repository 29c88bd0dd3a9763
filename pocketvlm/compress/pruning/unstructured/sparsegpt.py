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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pocketvlm.compress.layerwise.error_feedback import Factor, quantize_with_feedback
from pocketvlm.compress.layerwise.hessian import ErrorFeedback, InputHessian
from pocketvlm.compress.pruning.unstructured.masked_rounding import (
    Compare,
    MaskedRounding,
    check_compare,
    count_groups,
    layer_scores,
    mask_columns,
)
from pocketvlm.compress.pruning.unstructured.patterns import Pattern
from pocketvlm.compress.pruning.unstructured.score import (
    Pruned,
    PruningScore,
    PruningTask,
    prune_by_score,
)
from pocketvlm.compress.pruning.unstructured.wanda import score_wanda
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["SparseGpt", "prune_with_feedback"]

_NOT_POSITIVE = (
    "the Cholesky factorization failed at every damping up to 1: its mask is Wanda's, and nothing "
    "makes up for what is dropped"
)


def prune_with_feedback(
    weights: Tensor,
    hessian: InputHessian,
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
        hessian: Of the input.
        factors: One per diagonal block, in groups of `width`.
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
    alive = hessian.importance > 0
    counts = count_groups(layer_scores(weights, hessian, factors), pattern, kept, compare, width)
    values, mask = torch.empty_like(weights), torch.empty(weights.shape, dtype=torch.bool)
    for part, factor in zip(hessian.slices, factors, strict=True):
        first = part.start // width
        rounding = MaskedRounding(factor, alive[part], pattern, compare, width, counts[first:])
        values[:, part] = quantize_with_feedback(weights[:, part], factor, rounding).T
        mask[:, part] = rounding.mask
    return mask, values


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

    @property
    def feedback(self) -> ErrorFeedback:
        """Columns are processed from left to right."""
        return ErrorFeedback(damping=self.damping)

    def prune(self, task: PruningTask, weight: WeightForm, hessian: InputHessian | None) -> Pruned:
        """Drops weights, and updates those that stay."""
        if hessian is None:
            raise TypeError("SparseGPT needs its layers' inputs")
        dense = weight.dequantize().to(torch.float64)
        width = mask_columns(task.pattern)
        if None in hessian.factorize(width):
            scores = score_wanda(dense, hessian.importance)
            return prune_by_score(task, weight, scores, {"reason": _NOT_POSITIVE})
        factors = hessian.factors(width)
        mask, values = prune_with_feedback(
            dense,
            hessian,
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
            figures={"damping": damping, "damping_raised": damping > hessian.feedback.damping},
        )
