"""The checkpoint's token reducer as exporters trace it: an exporter knows no method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pocketvlm.models.reducer import TokenReducer
from pocketvlm.models.spec import ModelSpec
from pocketvlm.reference_graph.torch_ops import TorchOps

__all__ = ["ReducerGraph"]


class ReducerGraph(nn.Module):
    """A reducer between the values that the vision graph has at hand.

    Its inputs are `features` [1, N, C], `queries` and `keys` [1, tokens, hidden] of the feature
    block, its outputs the kept features [1, k, C] and their indices [1, k].
    """

    def __init__(self, reducer: TokenReducer, spec: ModelSpec) -> None:
        super().__init__()
        self.reducer = reducer
        self._spec = spec

    def forward(self, features: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Reduces the features of one picture."""
        ops = TorchOps(self, self._spec, reducer=self.reducer)
        return ops.reduce(features, queries, keys)

    def example(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random inputs of the shapes of this model."""
        tower = self._spec.tower
        width = self._spec.projector.merged_width(tower.feature_size)
        generator = torch.Generator().manual_seed(0)
        features, queries, keys = (
            torch.randn(shape, generator=generator)
            for shape in (
                (1, self._spec.visual_tokens, width),
                (1, tower.tokens, tower.hidden_size),
                (1, tower.tokens, tower.hidden_size),
            )
        )
        return features, queries, keys
