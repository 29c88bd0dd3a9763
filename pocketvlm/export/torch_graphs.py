"""The phone graphs as torch modules, for targets that trace one, and to test the definition.

`VisionGraph`, `EmbeddingGraph` and `DecoderGraph` take and return what the bundle's graphs do:
static shapes, a batch of one, a cache of fixed capacity that the caller owns. They use no mask,
cache or attention machinery of transformers, whose data-dependent branches no tracer follows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.export.signatures import cache_names
from pocketvlm.graph.builders import build_decoder, build_embedding, build_vision
from pocketvlm.graph.rotary import rotary_angles, rotate_by_position
from pocketvlm.models.spec import ModelSpec
from pocketvlm.reference_graph.torch_ops import TorchOps

__all__ = ["DecoderGraph", "EmbeddingGraph", "VisionGraph"]


class DecoderCache:
    """The cache of one call of the decoder: slots after the past are filled, none is moved.

    Args:
        spec: The model.
        positions: Rotary positions of the new tokens, int64 [axes, length].
        past_length: Filled slots, int64 [1].
        tensors: Keys and values of blocks, each [1, kv_heads, capacity, head_dim], and states of
            short convolutions, [1, taps - 1, width], in the order of `cache_names`.

    Attributes:
        tensors: What they have become.
    """

    def __init__(
        self, spec: ModelSpec, positions: Tensor, past_length: Tensor, tensors: tuple[Tensor, ...]
    ) -> None:
        self.tensors = dict(zip(cache_names(spec, "past"), tensors, strict=True))
        self._decoder = spec.decoder
        self._positions = positions[:, None]
        self._slots = past_length + torch.arange(positions.shape[1])
        key = self.tensors[f"past.{spec.decoder.attention_blocks[0]}.key"]
        capacity = torch.arange(key.shape[2])
        # What a token may see is told by slots, not by positions, which may have gaps.
        self.visible = capacity[None] <= self._slots[:, None]

    def rotate(self, block: int, heads: Tensor) -> Tensor:
        """Rotary embedding of [1, heads, length, head_dim]."""
        angles = rotary_angles(self._decoder.rope_of(block), self._positions)
        return rotate_by_position(heads, *angles)

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Writes new keys and values into the slots after the past; attends to all slots."""
        names = (f"past.{block}.key", f"past.{block}.value")
        for name, new in zip(names, (key, value), strict=True):
            self.tensors[name] = self.tensors[name].index_copy(2, self._slots, new)
        return functional.scaled_dot_product_attention(
            query,
            self.tensors[names[0]],
            self.tensors[names[1]],
            attn_mask=self.visible,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def after_past(self, block: int, values: Tensor, rows: int) -> Tensor:
        """The state of a block with values after it; its last rows are the next state."""
        name = f"past.{block}.conv"
        window = torch.cat([self.tensors[name], values], dim=1)
        self.tensors[name] = window[:, -rows:]
        return window


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
        return build_embedding(TorchOps(self.model, self._spec), self._spec, input_ids)


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
        ops = TorchOps(self.model, self._spec, context=cache)
        logits = build_decoder(ops, self._spec, embeds)
        return logits, *cache.tensors.values()
