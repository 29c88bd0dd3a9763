"""Wanda: weights times the norm of what they multiply.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695,
equation 1: S_ij = |W_ij| * ||X_j||_2, compared within an output row. The norm is the root of the
*mean* square over tokens, so that it depends neither on their number nor on how they were batched;
within a row that changes no comparison. Tokens of the decoder may be weighed by modality.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pocketvlm.compress.layerwise.hessian import InputHessian
from pocketvlm.compress.pruning.unstructured.score import (
    Pruned,
    PruningScore,
    PruningTask,
    prune_by_score,
)
from pocketvlm.weights.form import WeightForm

__all__ = ["Wanda", "score_wanda"]


def score_wanda(weights: Tensor, mean_squares: Tensor) -> Tensor:
    """|W_ij| * sqrt(E[x_j^2]), float64 [rows, columns].

    Args:
        weights: [rows, columns].
        mean_squares: E[x_j^2] over calibration tokens, [columns].
    """
    return weights.to(torch.float64).abs() * mean_squares.to(torch.float64).sqrt()


@dataclass(frozen=True, kw_only=True)
class Wanda(PruningScore):
    """Keeps what moves outputs most, by the size of weights and inputs (arXiv 2306.11695)."""

    kind: Literal["wanda"] = "wanda"

    def prune(self, task: PruningTask, weight: WeightForm, hessian: InputHessian | None) -> Pruned:
        """Keeps what scores highest."""
        if hessian is None:
            raise TypeError("Wanda needs its layers' inputs")
        return prune_by_score(task, weight, score_wanda(weight.dequantize(), hessian.importance))
