"""What operators over torch tensors share, whatever runs them: `GraphOps` without its kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pocketvlm.graph.rotary import patch_positions
from pocketvlm.graph.token_merging import TowerTokens, match_tokens, merge_tokens
from pocketvlm.models.reducer import BlockRows, ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec
from pocketvlm.models.token_merging import TokenMerge
from pocketvlm.models.tower import TowerSpec

__all__ = [
    "TensorOps",
    "join_heads",
    "join_windows",
    "merge_patches",
    "split_heads",
    "split_windows",
]


class TensorOps(ABC):
    """Everything other than matrix products, norms and attention.

    Args:
        spec: What the model is.
        reducer: The token reduction, or `None`.
    """

    def __init__(self, spec: ModelSpec, reducer: TokenReducer | None) -> None:
        self._spec = spec
        self._reducer = reducer

    @property
    def earlier_blocks(self) -> tuple[int, ...]:
        return () if self._reducer is None else self._reducer.earlier_blocks

    @abstractmethod
    def linear_layer(self, inputs: Tensor, name: str) -> Tensor:
        """One linear layer."""

    @abstractmethod
    def norm(self, inputs: Tensor, name: str) -> Tensor: ...

    @abstractmethod
    def _module(self, name: str) -> nn.Module:
        """A submodule of the model."""

    # Layers that share an input stay apart, since no kernel of ExecuTorch cuts what has no
    # fixed size: what stands for their joined outputs is the input, and each layer is
    # applied where the outputs are split.
    def linear(self, inputs: Tensor, *names: str) -> Tensor:
        return self.linear_layer(inputs, names[0]) if len(names) == 1 else inputs

    def split(self, joined: Tensor, *names: str) -> tuple[Tensor, ...]:
        return tuple(self.linear_layer(joined, name) for name in names)

    def embed_patches(self, pixels: Tensor) -> Tensor:
        tower = self._spec.tower
        patches = self._module(tower.patch_embedding)(pixels).flatten(2).transpose(1, 2)
        if tower.class_embedding is not None:
            token = getattr(self._module(tower.embeddings), tower.class_embedding)
            token = token.view(1, 1, -1).expand(patches.shape[0], -1, -1)
            patches = torch.cat([token, patches], dim=1)
        if tower.position_embedding is None:
            return cast("Tensor", patches)
        # Row by row: the patches of one whole image are in raster order.
        return cast("Tensor", patches + self.position_rows(tower.position_embedding)[None])

    def position_rows(self, name: str) -> Tensor:
        """Learned positions of the tower's tokens, [tokens, hidden]."""
        table = cast("Tensor", self._module(name).weight)
        return patch_positions(self._spec.tower, table)

    def split_channels(self, joined: Tensor, width: int) -> tuple[Tensor, ...]:
        return tuple(
            joined[..., start : start + width] for start in range(0, joined.shape[-1], width)
        )

    def widen(self, inputs: Tensor, width: int) -> Tensor:
        return functional.pad(inputs, (0, width - inputs.shape[-1]))

    def take(self, features: Tensor, indices: Tensor) -> Tensor:
        return features.gather(1, indices[..., None].expand(-1, -1, features.shape[-1]))

    def add_norm(self, inputs: Tensor, residual: Tensor, name: str) -> tuple[Tensor, Tensor]:
        total = inputs + residual
        return self.norm(total, name), total

    def norm_heads(self, joined: Tensor, name: str) -> Tensor:
        tower = self._spec.tower
        return self.norm(joined.unflatten(-1, (tower.heads, tower.head_dim)), name).flatten(-2)

    def head_norm(self, heads: Tensor, name: str | None) -> Tensor:
        """Heads, their channels last, after their norm where they have one."""
        return heads if name is None else self.norm(heads, name)

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right

    def activation(self, inputs: Tensor, kind: str) -> Tensor:
        from transformers.activations import ACT2FN

        return cast("Tensor", ACT2FN[kind](inputs))

    def gated(self, joined: Tensor, gate: str, up: str, kind: str) -> Tensor:
        opened, values = self.split(joined, gate, up)
        return self.activation(opened, kind) * values

    def join_channels(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, dim=-1)

    def drop_first(self, inputs: Tensor) -> Tensor:
        return inputs[:, 1:]

    def last(self, inputs: Tensor) -> Tensor:
        return inputs[:, -1:]

    def merge_patches(self, features: Tensor, factor: int) -> Tensor:
        return merge_patches(features, factor, self._spec.tower.rows)

    def average_patches(self, features: Tensor, factor: int) -> Tensor:
        cells = merge_patches(features, factor, self._spec.tower.rows)
        return cells.unflatten(-1, (factor**2, features.shape[-1])).mean(dim=-2)

    def merge_tokens(
        self,
        merge: TokenMerge,
        hidden: Tensor,
        queries: Tensor,
        keys: Tensor,
        before: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = None if before is None else TowerTokens(sizes=before[0], places=before[1])
        target = self.match_tokens(merge, hidden, queries, keys)
        count = self._spec.tower.tokens_after(merge)
        merged, tokens = merge_tokens(hidden, target, count, tokens)
        return merged, tokens.sizes, tokens.places

    def match_tokens(
        self, merge: TokenMerge, hidden: Tensor, queries: Tensor, keys: Tensor
    ) -> Tensor:
        """The token that each becomes part of, as `graph.token_merging.match_tokens`."""
        return match_tokens(merge, self._spec.tower, hidden, self._block_rows(queries, keys))

    def reduce(
        self,
        features: Tensor,
        queries: Tensor,
        keys: Tensor,
        earlier: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> tuple[Tensor, Tensor]:
        if self._reducer is None:
            places = torch.arange(features.shape[1], device=features.device)
            return features, places.expand(features.shape[0], -1)
        tower, last = self._spec.tower, self._block_rows(queries, keys)
        kept, indices = self._reducer(
            ReducerInputs(
                features=features,
                queries=last.queries,
                keys=last.keys,
                has_cls=tower.has_cls,
                merge_factor=self._spec.projector.merge_factor,
                patch_rows=tower.rows,
                earlier=tuple(self._block_rows(*pair) for pair in earlier),
            )
        )
        return kept, indices

    def _block_rows(self, queries: Tensor, keys: Tensor) -> BlockRows:
        """Queries and keys [1, tokens, hidden] as a reducer takes them."""
        heads, width = self._spec.tower.heads, self._spec.tower.head_dim
        return BlockRows(
            queries=split_heads(queries, heads, width) * width**-0.5,
            keys=split_heads(keys, heads, width),
        )


def split_heads(joined: Tensor, heads: int, width: int) -> Tensor:
    """[batch, rows, heads * width] as [batch, heads, rows, width]."""
    return joined.view(*joined.shape[:2], heads, width).transpose(1, 2)


def join_heads(heads: Tensor) -> Tensor:
    """[batch, heads, rows, width] as [batch, rows, heads * width]."""
    return heads.transpose(1, 2).flatten(2)


def split_windows(states: Tensor, tower: TowerSpec, side: int) -> Tensor:
    """[batch, heads, patches, width] as [batch * windows, heads, side**2, width]."""
    batch, heads, _, width = states.shape
    down, across = tower.rows // side, tower.columns // side
    grid = states.reshape(batch, heads, down, side, across, side, width)
    return grid.permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, heads, side * side, width)


def join_windows(states: Tensor, tower: TowerSpec, side: int) -> Tensor:
    """What `split_windows` took apart."""
    _, heads, _, width = states.shape
    down, across = tower.rows // side, tower.columns // side
    grid = states.reshape(-1, down, across, heads, side, side, width)
    return grid.permute(0, 3, 1, 4, 2, 5, 6).reshape(-1, heads, tower.patches, width)


def merge_patches(features: Tensor, merge_factor: int, rows: int) -> Tensor:
    """Pixel shuffle: each square of patches becomes one token, channels in raster order.

    Args:
        features: [images, rows * columns, C].
        merge_factor: Side of the square, s.
        rows: Patches of an image from top to bottom.

    Returns:
        [images, rows * columns / s**2, C * s**2], tokens in raster order of the merged grid.
    """
    if merge_factor == 1:
        return features
    images, count, width = features.shape
    factor = merge_factor
    down, across = rows // factor, count // rows // factor
    grid = features.reshape(images, down, factor, across, factor * width)
    return grid.transpose(2, 3).reshape(images, down * across, factor * factor * width)
