"""Magnitude pruning: small weights go; the baseline that every other score has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pocketvlm.compress.layerwise.hessian import InputHessian
from pocketvlm.compress.pruning.unstructured.score import (
    Pruned,
    PruningScore,
    PruningTask,
    prune_by_score,
)
from pocketvlm.weights.form import WeightForm

__all__ = ["Magnitude"]


@dataclass(frozen=True, kw_only=True)
class Magnitude(PruningScore):
    """Keeps the largest |W_ij| of every output row; looks at no picture.

    Published baselines compare over a whole layer (Han et al., arXiv 1506.02626); here it is the
    group of Wanda, so that the two differ in their score alone.
    """

    needs_inputs: ClassVar[bool] = False

    kind: Literal["magnitude"] = "magnitude"

    def prune(self, task: PruningTask, weight: WeightForm, hessian: InputHessian | None) -> Pruned:
        """Keeps what is largest."""
        return prune_by_score(task, weight, weight.dequantize().abs())
