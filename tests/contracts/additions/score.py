"""A score of weights that the package lacks: relative importance and activations (RIA).

Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
ICLR 2024, equation 4: S_ij = (|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) * ||X_j||_2 ** a.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pocketvlm.compress.layerwise.hessian import InputHessian
from pocketvlm.compress.pruning.unstructured.score import (
    Pruned,
    PruningScore,
    PruningTask,
    prune_by_score,
)
from pocketvlm.weights.form import WeightForm


def score_ria(weights: Tensor, mean_squares: Tensor, exponent: float) -> Tensor:
    """Scores of weights [rows, columns] from the mean squares of their inputs [columns]."""
    size = weights.double().abs()
    relative = size / size.sum(1, keepdim=True) + size / size.sum(0, keepdim=True)
    return relative * mean_squares.double().sqrt() ** exponent


@dataclass(frozen=True, kw_only=True)
class Ria(PruningScore):
    """Keeps weights that are large in their row and their column, and that see large inputs."""

    kind: Literal["ria"] = "ria"
    exponent: float = 0.5

    def prune(self, task: PruningTask, weight: WeightForm, hessian: InputHessian | None) -> Pruned:
        assert hessian is not None
        scores = score_ria(weight.dequantize(), hessian.importance, self.exponent)
        return prune_by_score(task, weight, scores)
