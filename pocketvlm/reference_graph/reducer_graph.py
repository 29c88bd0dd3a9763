"""What chooses among visual tokens as exporters trace it: an exporter knows no method."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from pocketvlm.models.reducer import TokenReducer
from pocketvlm.models.spec import ModelSpec
from pocketvlm.models.token_merging import TokenMerge
from pocketvlm.reference_graph.torch_ops import TorchOps

__all__ = ["MergeGraph", "ReducerGraph"]


class ReducerGraph(nn.Module):
    """A reducer between the values that the vision graph has at hand.

    Its inputs are `features` [1, N, C], `queries` and `keys` [1, tokens, hidden] of the feature
    block, then those of each earlier block that the reducer reads, its outputs the kept features
    [1, k, C] and their indices [1, k].
    """

    def __init__(self, reducer: TokenReducer, spec: ModelSpec) -> None:
        super().__init__()
        self.reducer = reducer
        self._spec = spec

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its inputs, in order."""
        earlier = ((f"queries_{block}", f"keys_{block}") for block in self.reducer.earlier_blocks)
        return ("features", "queries", "keys", *chain.from_iterable(earlier))

    def forward(
        self, features: Tensor, queries: Tensor, keys: Tensor, *earlier: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Reduces the features of one picture."""
        ops = TorchOps(self, self._spec, reducer=self.reducer)
        pairs = list(zip(earlier[::2], earlier[1::2], strict=True))
        return ops.reduce(features, queries, keys, pairs)

    def example(self) -> tuple[Tensor, ...]:
        """Random inputs of the shapes of this model."""
        tower = self._spec.tower
        width = self._spec.projector.merged_width(tower.feature_size)
        rows = (1, tower.tokens, tower.hidden_size)
        shapes = ((1, self._spec.visual_tokens, width), *[rows] * (len(self.names) - 1))
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(shape, generator=generator) for shape in shapes)


class MergeGraph(nn.Module):
    """A merge of tokens between the values that the tower has at hand.

    Its inputs are `hidden`, `queries` and `keys` [1, tokens, hidden] and, where tokens were merged
    before, their `sizes` [1, tokens, 1] and `places` [1, all]; its outputs are hidden states, sizes
    and places after it.
    """

    def __init__(self, merge: TokenMerge, spec: ModelSpec) -> None:
        super().__init__()
        self._merge = merge
        self._spec = spec

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its inputs, in order."""
        is_first = self._merge == self._spec.tower.merges[0]
        return ("hidden", "queries", "keys", *(() if is_first else ("sizes", "places")))

    def forward(
        self, hidden: Tensor, queries: Tensor, keys: Tensor, *before: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Merges the tokens of one picture."""
        ops = TorchOps(self, self._spec)
        pair = (before[0], before[1]) if before else None
        return ops.merge_tokens(self._merge, hidden, queries, keys, pair)

    def example(self) -> tuple[Tensor, ...]:
        """Random inputs of the shapes of this model."""
        tower, generator = self._spec.tower, torch.Generator().manual_seed(0)
        tokens = tower.tokens_entering(self._merge.block)
        states = [torch.randn(1, tokens, tower.hidden_size, generator=generator) for _ in range(3)]
        if len(self.names) == len(states):
            return tuple(states)
        places = torch.arange(tower.tokens)[None].clamp_max(tokens - 1)
        return (*states, torch.ones(1, tokens, 1), places)
