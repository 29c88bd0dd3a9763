"""A reducer whose indices are the same for every image: what the position-only baselines share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pocketvlm.compress.tokens.rank.ranking import gather_tokens
from pocketvlm.models.reducer import PositionPolicy, ReducerInputs, TokenReducer

__all__ = ["FixedReducer"]


class FixedReducer(TokenReducer):
    """Keeps the same tokens of every image; the indices are a constant of the graph."""

    chosen: Tensor

    def __init__(self, indices: Sequence[int], *, positions: PositionPolicy) -> None:
        super().__init__(keep=len(indices), positions=positions)
        self.register_buffer("chosen", torch.tensor(indices, dtype=torch.int64), persistent=False)

    def forward(self, inputs: ReducerInputs) -> tuple[Tensor, Tensor]:
        """Returns the kept features [B, k, C] and their indices [B, k] (int64, ascending)."""
        indices = self.chosen.expand(inputs.features.shape[0], -1)
        return gather_tokens(inputs.features, indices), indices
