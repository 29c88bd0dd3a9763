"""The three methods of an ExecuTorch program as modules to trace, and the rows between them.

Methods hand each other *rows*. Where rotary positions are counted row by row, a row is an
embedding. Where kept visual tokens keep the positions they had among all N, positions have gaps
that a runner, which knows only how many rows the cache holds, cannot tell; so a row then carries
two channels more, and the decoder keeps count itself:

- `offset`: the distance of the row from the running position,
- `advance`: how much the running position grows after it.

A text row is (0, 1); the visual token that was the i-th of N is (i, 0), and (i, N) when it is the
picture's last. Where positions have three axes there is an offset for each, and a picture advances
by its longer side. Position = running + offset. The running position after every cached row stays
in the program, so a conversation can be cut back anywhere and continued.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pocketvlm.export.executorch.layers import Kernels
from pocketvlm.export.executorch.ops import ExecutorchOps
from pocketvlm.export.executorch.schema import position_channels
from pocketvlm.graph.builders import build_decoder, build_embedding, build_vision
from pocketvlm.graph.rotary import inverse_frequencies, pair_selection
from pocketvlm.models.reducer import TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["DecoderMethod", "EmbeddingMethod", "VisionMethod"]


class VisionMethod(nn.Module):
    """`vision_encoder`: pixels to the picture's rows, and the indices of the tokens kept."""

    offsets: Tensor

    def __init__(self, kernels: Kernels, spec: ModelSpec, reducer: TokenReducer | None) -> None:
        super().__init__()
        self.kernels = kernels
        self.reducer = reducer
        self._spec = spec
        grid = spec.position_grid
        if grid is not None:
            offsets = torch.from_numpy(grid.offsets(np.arange(grid.tokens)))
            self.register_buffer("offsets", offsets.t().to(torch.float32))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[1, C, S, S] to rows [1, k, width] and int64 [1, k]."""
        ops = ExecutorchOps(self.kernels, self._spec, reducer=self.reducer)
        embeds, indices = build_vision(ops, self._spec, pixel_values)
        if not position_channels(self._spec, self.reducer):
            return embeds, indices
        count, grid = embeds.shape[1], self._spec.position_grid
        if grid is None:
            offset, last = indices[..., None].to(torch.float32), self._spec.visual_tokens
        else:
            offset, last = functional.embedding(indices, self.offsets), grid.advance
        advance = torch.tensor([0.0] * (count - 1) + [float(last)])
        return torch.cat([embeds, offset, advance[None, :, None]], dim=-1), indices


class EmbeddingMethod(nn.Module):
    """`token_embedding`: token ids to rows."""

    def __init__(self, kernels: Kernels, spec: ModelSpec, reducer: TokenReducer | None) -> None:
        super().__init__()
        self.kernels = kernels
        self._spec = spec
        self._channels = position_channels(spec, reducer)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[1, length] to [1, length, width]."""
        embeds = build_embedding(ExecutorchOps(self.kernels, self._spec), input_ids)
        if not self._channels:
            return embeds
        advance = torch.ones_like(embeds[..., :1])
        offsets = [torch.zeros_like(advance)] * (self._channels - 1)
        return torch.cat([embeds, *offsets, advance], dim=-1)


class DecoderMethod(nn.Module):
    """`text_decoder`: rows and the number of rows before them to the last row's logits.

    Args:
        kernels: Its layers.
        spec: The model.
        reducer: The token reduction, or `None`.
        capacity: Rows of KV cache.
    """

    frequencies: Tensor
    running: Tensor

    def __init__(
        self, kernels: Kernels, spec: ModelSpec, reducer: TokenReducer | None, *, capacity: int
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.capacity = capacity
        self._spec = spec
        self._reads_channels = position_channels(spec, reducer) > 0
        decoder = spec.decoder
        shape = (1, capacity, decoder.kv_heads, decoder.head_dim)
        for block in decoder.attention_blocks:
            self.register_buffer(f"key_{block}", torch.zeros(shape))
            self.register_buffer(f"value_{block}", torch.zeros(shape))
        for block, conv in decoder.convolutions.items():
            # Row i + taps - 1 is that of slot i; those before the first stay zero.
            rows = torch.zeros(1, capacity + conv.taps - 1, 1, decoder.hidden_size)
            self.register_buffer(f"conv_{block}", rows)
        if self._reads_channels:
            # Entry i is the running position after the first i rows.
            self.register_buffer("running", torch.zeros(1, capacity + 1, 1, 1))
        frequencies = inverse_frequencies(decoder.rope)
        if decoder.rope.axes > 1:
            frequencies = frequencies * pair_selection(decoder.rope)
        self.register_buffer("frequencies", frequencies)
        self._start = 0

    def forward(self, rows: Tensor, input_pos: Tensor) -> Tensor:
        """[1, length, width] and int64 [1] to [1, 1, vocabulary]."""
        start = cast("int", input_pos[0].item())
        torch._check(start >= 0)  # noqa: SLF001  (how torch.export is told a bound)
        torch._check(start + rows.shape[1] <= self.capacity)  # noqa: SLF001
        self._start = start
        width = self._spec.decoder.hidden_size
        embeds = rows[..., :width] if self._reads_channels else rows
        angles = self._angles(self._positions(rows, input_pos, start))
        angles = torch.cat([angles, angles], dim=-1)[:, :, None]
        self._cosine, self._sine = angles.cos(), angles.sin()
        ops = ExecutorchOps(self.kernels, self._spec, cache=self)
        return build_decoder(ops, self._spec, embeds)

    def rotate(self, heads: Tensor) -> Tensor:
        """Rotary embedding of [1, length, heads, head_dim] (arXiv 2104.09864, eq. 34)."""
        return heads * self._cosine + self.kernels.rotate_half(heads) * self._sine

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Extends the cache of a block and attends to all of it."""
        keys, values = getattr(self, f"key_{block}"), getattr(self, f"value_{block}")
        torch.ops.llama.update_cache(key, keys, self._start)
        torch.ops.llama.update_cache(value, values, self._start)
        attended = torch.ops.llama.custom_sdpa(
            query,
            keys,
            values,
            self._start,
            None,
            0.0,
            True,  # noqa: FBT003  (is_causal; the operator takes no names)
        )
        return cast("Tensor", attended)

    def windows(self, block: int, values: Tensor) -> tuple[Tensor, ...]:
        """Extends the rows of a short convolution; returns those that each of its taps sees.

        All rows are kept, as those of keys are: a runner that knows no states can cut a
        conversation back anywhere, and an empty cache needs no clearing.
        """
        rows = getattr(self, f"conv_{block}")
        taps = self._spec.decoder.convolutions[block].taps
        torch.ops.llama.update_cache(values[:, :, None], rows, self._start + taps - 1)
        slots = self._start + torch.arange(values.shape[1])
        return tuple(rows[:, :, 0].index_select(1, slots + tap) for tap in range(taps))

    def _positions(self, rows: Tensor, input_pos: Tensor, start: int) -> Tensor:
        """Rotary positions, float32 [1, length], or [1, length, axes] where they have several."""
        if not self._reads_channels:
            return (input_pos + torch.arange(rows.shape[1]))[None].to(torch.float32)
        width = self._spec.decoder.hidden_size
        axes = self._spec.decoder.rope.axes
        offset, advance = rows[..., width], rows[..., width + axes]
        before = self.running[:, start, 0, 0][None]
        # An empty cache begins at 0, whatever the last conversation left.
        before = torch.where(input_pos > 0, before, torch.zeros_like(before))
        behind = before + advance.cumsum(dim=-1)
        torch.ops.llama.update_cache(behind[..., None, None], self.running, start + 1)
        if axes == 1:
            return behind - advance + offset
        return (behind - advance)[..., None] + rows[..., width : width + axes]

    def _angles(self, positions: Tensor) -> Tensor:
        """Angles of the pairs of a head, float32 [1, length, width / 2]."""
        axes = self._spec.decoder.rope.axes
        if axes == 1:
            return positions[..., None] * self.frequencies
        # Every pair has a frequency on one axis alone.
        turned = [positions[..., axis, None] * self.frequencies[axis] for axis in range(axes)]
        return torch.stack(turned).sum(dim=0)
