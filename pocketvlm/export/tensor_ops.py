"""What operators over torch tensors share, whatever runs them: `GraphOps` without its kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from pocketvlm.models.reducer import ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec
from pocketvlm.reference_graph.forward import merge_patches

__all__ = ["TensorOps", "split_heads"]


class TensorOps(ABC):
    """Everything other than matrix products, norms and attention.

    Args:
        spec: What the model is.
        reducer: The token reduction, or `None`.
    """

    def __init__(self, spec: ModelSpec, reducer: TokenReducer | None) -> None:
        self._spec = spec
        self._reducer = reducer

    @abstractmethod
    def split(self, joined: Tensor, *names: str) -> tuple[Tensor, ...]: ...

    @abstractmethod
    def norm(self, inputs: Tensor, name: str) -> Tensor: ...

    @abstractmethod
    def _module(self, name: str) -> nn.Module:
        """A submodule of the model."""

    def embed_patches(self, pixels: Tensor) -> Tensor:
        tower = self._spec.tower
        patches = self._module(tower.patch_embedding)(pixels).flatten(2).transpose(1, 2)
        if tower.class_embedding is not None:
            token = getattr(self._module(tower.embeddings), tower.class_embedding)
            patches = torch.cat([token.view(1, 1, -1), patches], dim=1)
        # Row by row: the patches of one whole image are in raster order.
        positions = cast("Any", self._module(tower.position_embedding))
        return cast("Tensor", patches + positions.weight[None])

    def add_norm(self, inputs: Tensor, residual: Tensor, name: str) -> tuple[Tensor, Tensor]:
        total = inputs + residual
        return self.norm(total, name), total

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right

    def activation(self, inputs: Tensor, kind: str) -> Tensor:
        from transformers.activations import ACT2FN

        return cast("Tensor", ACT2FN[kind](inputs))

    def gated(self, joined: Tensor, gate: str, up: str, kind: str) -> Tensor:
        opened, values = self.split(joined, gate, up)
        return self.activation(opened, kind) * values

    def drop_first(self, inputs: Tensor) -> Tensor:
        return inputs[:, 1:]

    def last(self, inputs: Tensor) -> Tensor:
        return inputs[:, -1:]

    def merge_patches(self, features: Tensor, factor: int) -> Tensor:
        return merge_patches(features, factor)

    def reduce(self, features: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        if self._reducer is None:
            return features, torch.arange(features.shape[1])[None]
        tower = self._spec.tower
        kept, indices = self._reducer(
            ReducerInputs(
                features=features,
                queries=split_heads(queries, tower.heads, tower.head_dim) * tower.head_dim**-0.5,
                keys=split_heads(keys, tower.heads, tower.head_dim),
                has_cls=tower.has_cls,
                merge_factor=self._spec.projector.merge_factor,
            )
        )
        return kept, indices


def split_heads(joined: Tensor, heads: int, width: int) -> Tensor:
    """[1, rows, heads * width] as [1, heads, rows, width]."""
    return joined.view(1, joined.shape[1], heads, width).transpose(1, 2)
