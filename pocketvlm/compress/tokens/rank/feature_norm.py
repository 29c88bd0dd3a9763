"""Feature norm: keep the tokens of the longest features.

A score for towers without [CLS] that costs one reduction. Vision transformers park global
information in a few tokens of outlying norm ("Vision Transformers Need Registers", arXiv
2309.16588), so that a long feature need not be a patch with content: measure it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pocketvlm.compress.tokens.rank.ranking import Ranking
from pocketvlm.models.reducer import ReducerInputs

__all__ = ["FeatureNorm"]


@dataclass(frozen=True, kw_only=True)
class FeatureNorm(Ranking):
    """Keeps the k visual tokens of the longest features."""

    kind: Literal["feature_norm"] = "feature_norm"

    def score(self, inputs: ReducerInputs) -> Tensor:
        """Euclidean norm of each visual token, [B, N]."""
        return inputs.features.square().sum(dim=-1).sqrt()
