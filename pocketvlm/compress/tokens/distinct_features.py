"""Distinct features: keep the tokens that are least like the picture as a whole.

The score is one minus the cosine between a token's feature and the mean feature of its picture.
Background is what most patches agree on, so it lies close to the mean; what is drawn on it does
not. It needs no [CLS] token and no attention: a mean, a product and two norms.

This is no published method: it is the first pick of a farthest-point selection, made of all tokens
at once, and it is here because it holds where attention does not (see `docs/methods`).
"""

from __future__ import annotations

from torch import Tensor

from pocketvlm.compress.tokens.options import ReducerOptions
from pocketvlm.compress.tokens.ranking import ScoreReducer
from pocketvlm.modelspec import ModelSpec
from pocketvlm.reduction import ReducerInputs

__all__ = ["DistinctFeaturesReducer", "build", "distinctness"]

_SMALLEST_NORM = 1e-12


def distinctness(features: Tensor) -> Tensor:
    """One minus the cosine of each feature and the mean feature of its picture.

    Args:
        features: [B, N, C].

    Returns:
        [B, N], 0 (like the mean) to 2 (its opposite).
    """
    mean = features.mean(dim=1, keepdim=True)
    product = (features * mean).sum(dim=-1)
    norms = features.square().sum(dim=-1).sqrt() * mean.square().sum(dim=-1).sqrt()
    return 1 - product / norms.clamp(min=_SMALLEST_NORM)


class DistinctFeaturesReducer(ScoreReducer):
    """Keeps the k visual tokens that are least like the mean of their picture."""

    def score(self, inputs: ReducerInputs) -> Tensor:
        """Distinctness of each visual token, [B, N]."""
        return distinctness(inputs.features)


def build(spec: ModelSpec, options: ReducerOptions) -> DistinctFeaturesReducer:
    """The reducer of one model."""
    del spec  # every tower has features
    return DistinctFeaturesReducer(keep=options.keep, positions=options.positions)
