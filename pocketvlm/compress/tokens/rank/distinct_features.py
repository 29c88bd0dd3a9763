"""Distinct features: keep the tokens that are least like the picture as a whole.

The score is the distance between a token's feature and the mean feature of its picture.
Background is what most patches agree on, so it lies close to the mean; what is drawn on it does
not. It needs neither [CLS] nor attention, and costs a mean and a norm.

This is no published method: it is the first pick of a farthest-point selection, made of all tokens
at once. It is here because received attention finds background, not content, on towers whose
background patches serve as registers (see `docs/methods`).
"""

from __future__ import annotations

from torch import Tensor

from pocketvlm.compress.tokens.options import ReducerOptions
from pocketvlm.compress.tokens.rank.ranking import ScoreReducer
from pocketvlm.models.reducer import ReducerInputs
from pocketvlm.models.spec import ModelSpec

__all__ = ["DistinctFeaturesReducer", "build", "distinctness"]


def distinctness(features: Tensor) -> Tensor:
    """Euclidean distance of each feature from the mean feature of its picture.

    Args:
        features: [B, N, C].

    Returns:
        [B, N], not negative.
    """
    away = features - features.mean(dim=1, keepdim=True)
    return away.square().sum(dim=-1).sqrt()


class DistinctFeaturesReducer(ScoreReducer):
    """Keeps the k visual tokens that are least like the mean of their picture."""

    def score(self, inputs: ReducerInputs) -> Tensor:
        """Distinctness of each visual token, [B, N]."""
        return distinctness(inputs.features)


def build(spec: ModelSpec, options: ReducerOptions) -> DistinctFeaturesReducer:
    """The reducer of one model."""
    del spec  # every tower has features
    return DistinctFeaturesReducer(keep=options.keep, positions=options.positions)
