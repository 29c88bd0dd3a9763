"""CDPruner's selection, without its text: the subset of the largest determinant.

Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in
MLLMs" (arXiv 2506.10967): tokens are drawn as a determinantal point process whose kernel is the
cosine of two features times the relevance of both, and the likeliest k of them are found greedily
(Chen et al., arXiv 1709.05135, algorithm 1: a Cholesky factor that grows by a row per token). The
volume that k features span counts all of them, where `max_min_distance` sees the closest pair.

What we do differently: relevance is not that to the question but the token's own, so that a picture
can be encoded before anybody asks, and kept for the turns that follow. The k steps are unrolled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from pocketvlm.compress.tokens.rank.tower_attention import tower_attention
from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.graph.selection import (
    cosine_similarity,
    gather_tokens,
    order_tokens,
    top_indices,
)
from pocketvlm.graph.token_scores import distinctness
from pocketvlm.models.reducer import PositionPolicy, ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["Determinantal", "DeterminantalReducer", "Relevance", "likeliest_tokens", "scaled"]

Relevance = Literal["uniform", "distinct_features", "attention"]
_CHOSEN = -1.0
"""Below every squared length, which are 0 to 1."""
_SMALLEST = 1e-9
"""Least squared length that is divided by: of tokens that lie in the span of the others."""


def scaled(scores: Tensor) -> Tensor:
    """Scores [B, N] between 0 for a picture's least and 1 for its largest (CDPruner, eq. 6)."""
    least, most = -(-scores).topk(1, dim=-1).values, scores.topk(1, dim=-1).values
    return (scores - least) / (most - least).clamp_min(1e-12)


def likeliest_tokens(features: Tensor, relevance: Tensor, keep: int) -> Tensor:
    """Greedily, the k tokens whose kernel has the largest determinant, in the order of choice.

    Args:
        features: [B, N, C].
        relevance: [B, N], 0 to 1.
        keep: k, at most N.

    Returns:
        int64 [B, k].
    """
    count = features.shape[1]
    likeness = cosine_similarity(features, features)
    # A product is not symmetric to the last bit, nor is a cosine with itself 1: rounding must not
    # decide between tokens that are equal.
    itself = torch.eye(count, dtype=features.dtype, device=features.device)
    likeness = (likeness + likeness.transpose(1, 2)) / 2 * (1 - itself) + itself
    kernel = relevance[:, :, None] * likeness * relevance[:, None]
    left = relevance.square()
    places = torch.arange(count, device=features.device)
    chosen: list[Tensor] = []
    factor: Tensor | None = None
    for step in range(keep):
        latest = left.topk(1, dim=-1).indices if step else top_indices(left, 1)
        chosen.append(latest)
        if step == keep - 1:
            break
        column = latest[..., None].expand(-1, -1, count)
        row = kernel.gather(1, column)[:, 0]
        if factor is not None:
            own = factor.gather(2, latest[:, None].expand(-1, step, -1))
            row = row - (own * factor).sum(dim=1)
        row = row / left.gather(1, latest).clamp_min(_SMALLEST).sqrt()
        factor = row[:, None] if factor is None else torch.cat([factor, row[:, None]], dim=1)
        taken = (places == latest).to(features.dtype)
        untaken = (left >= 0).to(features.dtype) * (1 - taken)
        left = (left - row.square()).clamp_min(0.0) * untaken + _CHOSEN * (1 - untaken)
    return torch.cat(chosen, dim=1)


class DeterminantalReducer(TokenReducer):
    """Keeps the k tokens of the greedy solution."""

    def __init__(self, *, relevance: Relevance, keep: int, positions: PositionPolicy) -> None:
        super().__init__(keep=keep, positions=positions)
        self._relevance = relevance

    def forward(self, inputs: ReducerInputs) -> tuple[Tensor, Tensor]:
        """Returns the kept features [B, k, C] and their indices [B, k] (int64, ascending)."""
        features = inputs.features
        match self._relevance:
            case "uniform":
                relevance = torch.ones_like(features[..., 0])
            case "distinct_features":
                relevance = scaled(distinctness(features))
            case "attention":
                relevance = scaled(tower_attention(inputs))
        indices = likeliest_tokens(features, relevance, self.keep)
        return order_tokens(gather_tokens(features, indices), indices)


@dataclass(frozen=True, kw_only=True)
class Determinantal(Reducer):
    """Keeps the k visual tokens that span the largest volume, by relevance.

    Attributes:
        relevance: What a token counts by itself: `uniform`, its distance from the picture's mean
            (`distinct_features`), or the `attention` that the tower pays to it.
    """

    kind: Literal["determinantal"] = "determinantal"
    relevance: Relevance = "distinct_features"

    def __post_init__(self) -> None:
        if self.relevance not in get_args(Relevance):
            raise ValueError(
                f"relevance is {self.relevance!r}; allowed are {', '.join(get_args(Relevance))}"
            )

    def build(self, spec: ModelSpec, *, keep: int, positions: PositionPolicy) -> TokenReducer:
        """The module of one model."""
        return DeterminantalReducer(relevance=self.relevance, keep=keep, positions=positions)
