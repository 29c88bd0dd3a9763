"""The phone graphs as torch modules, for targets that trace one, and to test the definition.

`VisionGraph`, `EmbeddingGraph` and `DecoderGraph` take and return what the bundle's graphs do:
static shapes, a batch of one, a cache of fixed capacity that the caller owns. They use no mask,
cache or attention machinery of transformers, whose data-dependent branches no tracer follows.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.export.builders import build_decoder, build_embedding, build_vision
from pocketvlm.export.tensor_ops import TensorOps, split_heads
from pocketvlm.models.reducer import TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["DecoderGraph", "EmbeddingGraph", "TorchOps", "VisionGraph"]


class TorchOps(TensorOps):
    """`GraphOps` over tensors.

    Args:
        model: Where layers come from.
        spec: What it is.
        reducer: The token reduction, or `None`.
        cache: For the decoder: positions, length of the past, and the cache tensors, which are
            replaced by extended ones.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        *,
        reducer: TokenReducer | None = None,
        cache: DecoderCache | None = None,
    ) -> None:
        super().__init__(spec, reducer)
        self._model = model
        self._cache = cache
        self._widths = {linear.name: linear.out_features for linear in spec.linears()}

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        return self._call(self._spec.decoder.embedding, token_ids)

    def linear(self, inputs: Tensor, *names: str) -> Tensor:
        outputs = [self._call(name, inputs) for name in names]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def split(self, joined: Tensor, *names: str) -> tuple[Tensor, ...]:
        return joined.split([self._widths[name] for name in names], dim=-1)

    def norm(self, inputs: Tensor, name: str) -> Tensor:
        return self._call(name, inputs)

    def attention(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        tower = self._spec.tower
        query, key, value = (
            split_heads(part, tower.heads, tower.head_dim) for part in (queries, keys, values)
        )
        return _join_heads(functional.scaled_dot_product_attention(query, key, value))

    def cached_attention(self, joined: Tensor, block: int, *names: str) -> Tensor:
        if self._cache is None:
            raise TypeError("the decoder needs a cache")
        decoder = self._spec.decoder
        queries, keys, values = self.split(joined, *names)
        query = self._cache.rotate(split_heads(queries, decoder.heads, decoder.head_dim))
        key = self._cache.rotate(split_heads(keys, decoder.kv_heads, decoder.head_dim))
        value = split_heads(values, decoder.kv_heads, decoder.head_dim)
        every_key, every_value = self._cache.extend(block, key, value)
        attended = functional.scaled_dot_product_attention(
            query,
            every_key,
            every_value,
            attn_mask=self._cache.visible,
            enable_gqa=decoder.heads != decoder.kv_heads,
        )
        return _join_heads(attended)

    def _module(self, name: str) -> nn.Module:
        return self._model.get_submodule(name)

    def _call(self, name: str, inputs: Tensor) -> Tensor:
        return cast("Tensor", self._module(name)(inputs))


class DecoderCache:
    """The cache of one call of the decoder: slots after the past are filled, none is moved.

    Args:
        spec: The model.
        positions: Rotary positions of the new tokens, int64 [1, length].
        past_length: Filled slots, int64 [1].
        tensors: Keys and values block by block, each [1, kv_heads, capacity, head_dim].
    """

    def __init__(
        self, spec: ModelSpec, positions: Tensor, past_length: Tensor, tensors: tuple[Tensor, ...]
    ) -> None:
        self.tensors = list(tensors)
        width = spec.decoder.head_dim
        exponents = torch.arange(0, width, 2).to(torch.float32) / width
        angles = positions[..., None].to(torch.float32) * (1.0 / spec.decoder.rope_theta**exponents)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        self._cosine, self._sine = angles.cos(), angles.sin()
        self._slots = past_length + torch.arange(positions.shape[1])
        capacity = torch.arange(tensors[0].shape[2])
        # What a token may see is told by slots, not by positions, which may have gaps.
        self.visible = capacity[None] <= self._slots[:, None]

    def rotate(self, heads: Tensor) -> Tensor:
        """Rotary embedding of [1, heads, length, head_dim] (arXiv 2104.09864, eq. 34)."""
        left, right = heads.chunk(2, dim=-1)
        return heads * self._cosine + torch.cat([-right, left], dim=-1) * self._sine

    def extend(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes new keys and values into the slots after the past; returns all slots."""
        for index, new in ((2 * block, key), (2 * block + 1, value)):
            self.tensors[index] = self.tensors[index].index_copy(2, self._slots, new)
        return self.tensors[2 * block], self.tensors[2 * block + 1]


class VisionGraph(nn.Module):
    """`pixel_values` to `embeds` and `indices`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.model = checkpoint.model
        self.reducer = checkpoint.reducer
        self._spec = checkpoint.spec

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[1, C, S, S] to [1, k, width] and [1, k]."""
        ops = TorchOps(self.model, self._spec, reducer=self.reducer)
        return build_vision(ops, self._spec, pixel_values)


class EmbeddingGraph(nn.Module):
    """`input_ids` to `embeds`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.model = checkpoint.model
        self._spec = checkpoint.spec

    def forward(self, input_ids: Tensor) -> Tensor:
        """[1, length] to [1, length, width]."""
        return build_embedding(TorchOps(self.model, self._spec), input_ids)


class DecoderGraph(nn.Module):
    """`embeds`, `position_ids`, `past_length` and the past to `logits` and the present."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.model = checkpoint.model
        self._spec = checkpoint.spec

    def forward(
        self, embeds: Tensor, position_ids: Tensor, past_length: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Returns [1, 1, vocabulary] and the cache, in the order of `cache_names`."""
        cache = DecoderCache(self._spec, position_ids, past_length, past)
        ops = TorchOps(self.model, self._spec, cache=cache)
        logits = build_decoder(ops, self._spec, embeds)
        return logits, *cache.tensors


def _join_heads(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)
