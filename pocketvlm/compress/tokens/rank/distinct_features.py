"""Distinct features: keep the tokens that are least like the picture as a whole.

The score is the distance between a token's feature and the mean feature of its picture.
Background is what most patches agree on, so it lies close to the mean; what is drawn on it does
not. It needs neither [CLS] nor attention, and costs a mean and a norm.

This is not a published method: it is the first pick of a farthest-point selection, made of all
tokens at once. It is here because received attention finds background, not content, on towers whose
background patches serve as registers (see `docs/methods`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pocketvlm.compress.tokens.rank.ranking import Ranking
from pocketvlm.graph.token_scores import distinctness
from pocketvlm.models.reducer import ReducerInputs

__all__ = ["DistinctFeatures"]


@dataclass(frozen=True, kw_only=True)
class DistinctFeatures(Ranking):
    """Keeps the k visual tokens that are least like the mean of their picture."""

    kind: Literal["distinct_features"] = "distinct_features"

    def score(self, inputs: ReducerInputs) -> Tensor:
        """Distinctness of each visual token, [B, N]."""
        return distinctness(inputs.features)
