"""DivPrune: keep the subset whose closest pair is as far apart as possible.

Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models" (arXiv
2503.02175): a max-min diversity problem on cosine distances, solved greedily. The first token is
the one whose nearest neighbour is farthest; each further one is the farthest from all that were
chosen. It needs no attention. The k steps are unrolled, so the graph grows with k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.graph.selection import (
    cosine_similarity,
    gather_tokens,
    order_tokens,
    top_indices,
)
from pocketvlm.models.reducer import PositionPolicy, ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["MaxMinDistance", "MaxMinReducer", "farthest_tokens"]

_CHOSEN = -4.0
"""Below every cosine distance, which are 0 to 2."""


def farthest_tokens(features: Tensor, keep: int) -> Tensor:
    """The greedy solution of the max-min diversity problem, in the order of choice.

    Args:
        features: [B, N, C].
        keep: k, at most N.

    Returns:
        int64 [B, k].
    """
    count = features.shape[1]
    similarity = cosine_similarity(features, features)
    # The nearest neighbours of two tokens are often each other, so that the first choice is between
    # equals; a product is not symmetric to the last bit, and rounding must not decide.
    distance = 1 - (similarity + similarity.transpose(1, 2)) / 2
    # A token's distance from itself must not count: one that cannot be replaces it.
    alone = distance + 4 * torch.eye(count, dtype=features.dtype, device=features.device)
    latest = top_indices(-(-alone).topk(1, dim=-1).values[..., 0], 1)
    chosen = [latest]
    nearest = distance.gather(1, latest[..., None].expand(-1, -1, count))[:, 0]
    places = torch.arange(count, device=features.device)
    for _ in range(keep - 1):
        taken = (places == latest).to(features.dtype)
        nearest = nearest * (1 - taken) + _CHOSEN * taken
        latest = nearest.topk(1, dim=-1).indices
        chosen.append(latest)
        row = distance.gather(1, latest[..., None].expand(-1, -1, count))[:, 0]
        nearest = torch.minimum(nearest, row)
    return torch.cat(chosen, dim=1)


class MaxMinReducer(TokenReducer):
    """Keeps the k tokens of the greedy solution."""

    def forward(self, inputs: ReducerInputs) -> tuple[Tensor, Tensor]:
        """Returns the kept features [B, k, C] and their indices [B, k] (int64, ascending)."""
        indices = farthest_tokens(inputs.features, self.keep)
        return order_tokens(gather_tokens(inputs.features, indices), indices)


@dataclass(frozen=True, kw_only=True)
class MaxMinDistance(Reducer):
    """Keeps k visual tokens that are as far from each other as possible."""

    kind: Literal["max_min_distance"] = "max_min_distance"

    def build(self, spec: ModelSpec, *, keep: int, positions: PositionPolicy) -> TokenReducer:
        """The module of one model."""
        return MaxMinReducer(keep=keep, positions=positions)
