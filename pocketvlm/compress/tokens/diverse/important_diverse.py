"""VisPruner: some tokens because they matter, the others because they differ.

Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in
VLMs" (arXiv 2412.01818v2, ICCV 2025). A share of the tokens is chosen by the tower's attention; of
the rest, tokens that are most like another one are removed until as many remain as are wanted.
Tokens are split into even and odd ones, and an even one goes if an odd one is like it.

The authors' code removes at most 8 tokens per step, which is about 70 products in a graph. Here a
step removes up to a quarter of what is left, of which half could go: a step of a half would take
every even token, whatever it is like.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pocketvlm.compress.tokens.rank.tower_attention import tower_attention
from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.graph.selection import (
    cosine_similarity,
    count_after_step,
    gather_tokens,
    order_tokens,
    split_indices,
    top_indices,
)
from pocketvlm.models.reducer import PositionPolicy, ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["ImportantDiverse", "ImportantDiverseReducer", "drop_duplicates"]


def drop_duplicates(features: Tensor, indices: Tensor, keep: int) -> Tensor:
    """The indices that remain after tokens most like another one are removed.

    Args:
        features: [B, n, C].
        indices: What these tokens are called, int64 [B, n], ascending.
        keep: Tokens that remain, at least 1.

    Returns:
        int64 [B, keep], ascending.
    """
    while (count := indices.shape[1]) > keep:
        even, odd = features[:, ::2], features[:, 1::2]
        closest = cosine_similarity(even, odd).topk(1, dim=-1).values[..., 0]
        left = count_after_step(count, keep) - odd.shape[1]
        names = indices[:, 1::2]
        if left:
            stay = top_indices(-closest, left)
            names = torch.cat([names, indices[:, ::2].gather(1, stay)], dim=1)
            features = torch.cat([odd, gather_tokens(even, stay)], dim=1)
            features, indices = order_tokens(features, names)
        else:
            features, indices = odd, names
    return indices


class ImportantDiverseReducer(TokenReducer):
    """Keeps `important` tokens by attention, and the others because they differ."""

    def __init__(self, *, important: int, keep: int, positions: PositionPolicy) -> None:
        super().__init__(keep=keep, positions=positions)
        self._important = important

    def forward(self, inputs: ReducerInputs) -> tuple[Tensor, Tensor]:
        """Returns the kept features [B, k, C] and their indices [B, k] (int64, ascending)."""
        features, attention = inputs.features, tower_attention(inputs)
        if self._important == self.keep:
            indices = top_indices(attention, self.keep)
            return gather_tokens(features, indices), indices
        indices, rest = split_indices(attention, self._important)
        diverse = drop_duplicates(gather_tokens(features, rest), rest, self.keep - self._important)
        indices = torch.cat([indices, diverse], dim=1)
        return order_tokens(gather_tokens(features, indices), indices)


@dataclass(frozen=True, kw_only=True)
class ImportantDiverse(Reducer):
    """Keeps some visual tokens by attention, and others because they differ.

    Attributes:
        important_share: The share of the k tokens that attention chooses; at least one is.
    """

    kind: Literal["important_diverse"] = "important_diverse"
    important_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.important_share <= 1:
            raise ValueError(f"important_share is {self.important_share}; allowed are 0 to 1")

    def build(self, spec: ModelSpec, *, keep: int, positions: PositionPolicy) -> TokenReducer:
        """The module of one model."""
        important = min(keep, max(1, round(self.important_share * keep)))
        return ImportantDiverseReducer(important=important, keep=keep, positions=positions)
