"""`GraphOps` in plain torch, over the modules of a checkpoint: the definition of every graph."""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor, nn
from torch.nn import functional

from pocketvlm.graph.rotary import patch_angles, rotate_by_position
from pocketvlm.graph.tensor_ops import (
    TensorOps,
    join_heads,
    join_windows,
    split_heads,
    split_windows,
)
from pocketvlm.models.reducer import TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["DecoderContext", "TorchOps"]


class DecoderContext(Protocol):
    """What the decoder's attention needs beside its inputs, in one call of the decoder."""

    def rotate(self, block: int, heads: Tensor) -> Tensor:
        """Rotary embedding of [batch, heads, length, head_dim] at the positions of this call."""
        ...

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Extends the cache of a block and attends to all that a row may see."""
        ...

    def after_past(self, block: int, values: Tensor, rows: int) -> Tensor:
        """Extends the state of a block, the last `rows` rows that it was given.

        Returns:
            The state before, zeros at the start, and the values [batch, length, width] after it.
        """
        ...


class TorchOps(TensorOps):
    """`GraphOps` over tensors [batch, tokens, channels]; autograd may record it.

    Args:
        model: Where layers come from.
        spec: What it is.
        reducer: The token reduction, or `None`.
        context: For the decoder.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        *,
        reducer: TokenReducer | None = None,
        context: DecoderContext | None = None,
    ) -> None:
        super().__init__(spec, reducer)
        self._model = model
        self._context = context

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        return self._call(self._spec.decoder.embedding, token_ids)

    def linear_layer(self, inputs: Tensor, name: str) -> Tensor:
        return self._call(name, inputs)

    def norm(self, inputs: Tensor, name: str) -> Tensor:
        return self._call(name, inputs)

    def attention(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        window: int | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        tower = self._spec.tower
        heads = [split_heads(part, tower.heads, tower.head_dim) for part in (queries, keys, values)]
        if tower.rope_theta is not None:
            angles = tuple(angle.to(queries.device) for angle in patch_angles(tower))
            heads[:2] = [rotate_by_position(part, *angles) for part in heads[:2]]
        if window is not None:
            heads = [split_windows(part, tower, window) for part in heads]
        query, key, value = heads
        # log s is added to scores: a key of size s counts s times.
        bias = None if sizes is None else sizes.log().transpose(1, 2)[:, None]
        attended = functional.scaled_dot_product_attention(query, key, value, bias)
        return join_heads(attended if window is None else join_windows(attended, tower, window))

    def cached_attention(self, joined: Tensor, block: int, *names: str) -> Tensor:
        query, key, value = self.decoder_heads(joined, block, *names)
        return join_heads(self._rows.attend(block, query, key, value))

    def decoder_heads(
        self, joined: Tensor, block: int, *names: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a block, each [batch, heads, length, head_dim].

        Queries and keys have passed their norms and are rotated.
        """
        decoder, context = self._spec.decoder, self._rows
        attention = decoder.attention(block)
        queries, keys, values = self.split(joined, *names)
        query = split_heads(queries, decoder.heads, decoder.head_dim)
        query = context.rotate(block, self.head_norm(query, attention.q_norm))
        key = split_heads(keys, decoder.kv_heads, decoder.head_dim)
        key = context.rotate(block, self.head_norm(key, attention.k_norm))
        return query, key, split_heads(values, decoder.kv_heads, decoder.head_dim)

    @property
    def _rows(self) -> DecoderContext:
        if self._context is None:
            raise TypeError("the decoder needs a context")
        return self._context

    def short_conv(self, joined: Tensor, block: int, *names: str) -> Tensor:
        conv = self._spec.decoder.convolutions[block]
        kernel = cast("nn.Conv1d", self._module(conv.kernel))
        before, after, values = self.split(joined, *names)
        window = self._rows.after_past(block, before * values, conv.taps - 1)
        return after * kernel(window.transpose(1, 2)).transpose(1, 2)

    def head(self, normed: Tensor) -> Tensor:
        return self._call(self._spec.decoder.head, normed)

    def _module(self, name: str) -> nn.Module:
        return self._model.get_submodule(name)

    def _call(self, name: str, inputs: Tensor) -> Tensor:
        return cast("Tensor", self._module(name)(inputs))
