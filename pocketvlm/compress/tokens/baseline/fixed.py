"""Reducers whose indices are the same for every image: what the position-only baselines share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.graph.selection import gather_tokens
from pocketvlm.models.reducer import PositionPolicy, ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["Fixed", "FixedReducer"]


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


class Fixed(Reducer):
    """A reducer that looks at no feature; a subclass says which tokens it keeps."""

    looks_at_pictures: ClassVar[bool] = False

    @abstractmethod
    def indices(self, count: int, keep: int) -> Sequence[int]:
        """Which `keep` of `count` tokens, ascending."""

    def build(self, spec: ModelSpec, *, keep: int, positions: PositionPolicy) -> TokenReducer:
        """The module of one model."""
        return FixedReducer(self.indices(spec.visual_tokens, keep), positions=positions)
