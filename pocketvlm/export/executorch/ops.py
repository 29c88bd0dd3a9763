"""The phone graphs in operators that ExecuTorch runs well: `GraphOps` of this target.

Everything between two KV-cache updates is spelled so that XNNPACK takes it whole: the mean of
squares of an RMS norm is a matrix product, heads are split without moving memory. Cosine and sine
stay outside, in float32 kernels that are exact for large angles.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from pocketvlm.export.executorch.layers import Kernels
from pocketvlm.graph.tensor_ops import TensorOps
from pocketvlm.models.reducer import TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["AttentionCache", "ExecutorchOps"]


class AttentionCache(Protocol):
    """What the decoder's attention needs beside its inputs; heads are [1, length, heads, dim]."""

    def rotate(self, block: int, heads: Tensor) -> Tensor:
        """Rotary embedding at the positions of this call."""
        ...

    def windows(self, block: int, values: Tensor) -> tuple[Tensor, ...]:
        """Extends the rows of a short convolution; returns those that each of its taps sees."""
        ...

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Extends the cache of a block and attends to all of it."""
        ...


class ExecutorchOps(TensorOps):
    """`GraphOps` over tensors, for tracing.

    Args:
        kernels: Where layers come from.
        spec: What the model is.
        reducer: The token reduction, or `None`.
        cache: For the decoder.
    """

    def __init__(
        self,
        kernels: Kernels,
        spec: ModelSpec,
        *,
        reducer: TokenReducer | None = None,
        cache: AttentionCache | None = None,
    ) -> None:
        super().__init__(spec, reducer)
        self._kernels = kernels
        self._cache = cache

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        rows = self._kernels.embed(token_ids, self._spec.decoder.embedding)
        scale = self._spec.decoder.embed_scale
        return rows if scale == 1.0 else rows * scale

    def head(self, normed: Tensor) -> Tensor:
        logits = self.linear(normed, self._spec.decoder.head)
        softcap = self._spec.decoder.logit_softcap
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    def linear_layer(self, inputs: Tensor, name: str) -> Tensor:
        return self._kernels.linear(inputs, name)

    def norm(self, inputs: Tensor, name: str) -> Tensor:
        layer = cast("Any", self._kernels.module(name))
        if isinstance(layer, torch.nn.LayerNorm):
            return cast("Tensor", layer(inputs))
        mean = self._kernels.mean(inputs * inputs)
        scale = torch.rsqrt(mean + layer.eps)
        return cast("Tensor", inputs * scale * layer.weight)

    def activation(self, inputs: Tensor, kind: str) -> Tensor:
        if kind == "gelu_pytorch_tanh":
            # XNNPACK computes the exact GELU whichever is asked for, so this one is spelled out.
            cubic = inputs + 0.044715 * inputs * inputs * inputs
            return 0.5 * inputs * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * cubic))
        return super().activation(inputs, kind)

    def attention(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        window: int | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        tower = self._spec.tower
        heads = [self._heads(part, tower.heads, tower.head_dim) for part in (queries, keys, values)]
        if tower.rope_theta is not None:
            cosine, sine = self._kernels.patch_angles(tower)
            heads[:2] = [
                part * cosine + self._kernels.rotate_half(part) * sine for part in heads[:2]
            ]
        if window is None:
            # The kernel adds a mask of every query to the scores: here log s, so that a key counts
            # s times.
            tokens = queries.shape[1]
            mask = None if sizes is None else sizes[..., 0].log().expand(tokens, -1).contiguous()
            attended = torch.ops.llama.custom_sdpa(*heads, 0, mask)
            return cast("Tensor", attended.view(1, -1, tower.hidden_size))
        down, across, width = tower.rows // window, tower.columns // window, tower.hidden_size
        inner = (down * across, window * window, tower.heads, tower.head_dim)
        cells = (down, window, across, window * width)
        split = [part.view(cells).transpose(1, 2).reshape(inner) for part in heads]
        attended = torch.ops.llama.custom_sdpa(*split, 0)
        attended = attended.view(down, across, window, window * width).transpose(1, 2)
        return cast("Tensor", attended.reshape(1, -1, width))

    def cached_attention(self, joined: Tensor, block: int, *names: str) -> Tensor:
        if self._cache is None:
            raise TypeError("the decoder needs a cache")
        decoder = self._spec.decoder
        attention = decoder.attention(block)
        queries, keys, values = self.split(joined, *names)
        query = self._heads(queries, decoder.heads, decoder.head_dim)
        query = self._cache.rotate(block, self.head_norm(query, attention.q_norm))
        key = self._heads(keys, decoder.kv_heads, decoder.head_dim)
        key = self._cache.rotate(block, self.head_norm(key, attention.k_norm))
        value = self._heads(values, decoder.kv_heads, decoder.head_dim)
        attended = self._cache.attend(block, query, key, value)
        return attended.view(1, -1, decoder.heads * decoder.head_dim)

    def short_conv(self, joined: Tensor, block: int, *names: str) -> Tensor:
        if self._cache is None:
            raise TypeError("the decoder needs a cache")
        conv = self._spec.decoder.convolutions[block]
        before, after, values = self.split(joined, *names)
        windows = self._cache.windows(block, before * values)
        kernel = cast("Any", self._kernels.module(conv.kernel))
        taps = kernel.weight[:, 0].unbind(dim=-1)
        total = sum(window * tap for window, tap in zip(windows, taps, strict=True))
        return after * (total if kernel.bias is None else total + kernel.bias)

    def position_rows(self, name: str) -> Tensor:
        return self._kernels.positions(name, self._spec.tower)

    def _module(self, name: str) -> torch.nn.Module:
        return self._kernels.module(name)

    @staticmethod
    def _heads(joined: Tensor, heads: int, width: int) -> Tensor:
        return joined.view(1, -1, heads, width)
