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

Where rows see each other, a row carries one channel more, the last: the number that it shares with
those that it sees, and that see it, in the same call; -1 for a row that sees the past alone.
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
        rows = [embeds]
        if position_channels(self._spec, self.reducer):
            rows += self._places(indices)
        if self._spec.decoder.mutual_rows is not None:
            rows.append(torch.zeros_like(embeds[..., :1]))
        return torch.cat(rows, dim=-1) if len(rows) > 1 else embeds, indices

    def _places(self, indices: Tensor) -> list[Tensor]:
        count, grid = indices.shape[1], self._spec.position_grid
        if grid is None:
            offset, last = indices[..., None].to(torch.float32), self._spec.visual_tokens
        else:
            offset, last = functional.embedding(indices, self.offsets), grid.advance
        advance = torch.tensor([0.0] * (count - 1) + [float(last)])
        return [offset, advance[None, :, None]]


class EmbeddingMethod(nn.Module):
    """`token_embedding`: token ids to rows."""

    def __init__(self, kernels: Kernels, spec: ModelSpec, reducer: TokenReducer | None) -> None:
        super().__init__()
        self.kernels = kernels
        self._spec = spec
        self._channels = position_channels(spec, reducer)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[1, length] to [1, length, width]."""
        embeds = build_embedding(ExecutorchOps(self.kernels, self._spec), self._spec, input_ids)
        one, rows = torch.ones_like(embeds[..., :1]), [embeds]
        if self._channels:
            rows += [*[torch.zeros_like(one)] * (self._channels - 1), one]
        if self._spec.decoder.mutual_rows is not None:
            rows.append(-one)
        return torch.cat(rows, dim=-1) if len(rows) > 1 else embeds


class DecoderMethod(nn.Module):
    """`text_decoder`: rows and the number of rows before them to the last row's logits.

    Args:
        kernels: Its layers.
        spec: The model.
        reducer: The token reduction, or `None`.
        capacity: Rows of KV cache.
    """

    frequencies: Tensor
    sliding_frequencies: Tensor
    running: Tensor
    numbers: Tensor

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
        if decoder.mutual_rows is not None:
            self.register_buffer("numbers", torch.zeros(1, capacity, 1, 1))
        if decoder.sliding is not None:
            sliding = inverse_frequencies(decoder.sliding.rope)
            self.register_buffer("sliding_frequencies", sliding)
        self._start = 0

    def forward(self, rows: Tensor, input_pos: Tensor) -> Tensor:
        """[1, length, width] and int64 [1] to [1, 1, vocabulary]."""
        start = cast("int", input_pos[0].item())
        torch._check(start >= 0)  # noqa: SLF001  (how torch.export is told a bound)
        torch._check(start + rows.shape[1] <= self.capacity)  # noqa: SLF001
        self._start = start
        width = self._spec.row_width
        decoder = self._spec.decoder
        embeds = rows[..., :width] if rows.shape[-1] > width else rows
        positions = self._positions(rows, input_pos, start)
        self._turns = _turns(self._angles(positions))
        if decoder.sliding is not None:
            self._sliding_turns = _turns(positions[..., None] * self.sliding_frequencies)
        if decoder.mutual_rows is not None:
            torch.ops.llama.update_cache(rows[..., -1:, None], self.numbers, start)
        self._masks = self._visible(rows, input_pos) if decoder.has_masks else {}
        ops = ExecutorchOps(self.kernels, self._spec, cache=self)
        return build_decoder(ops, self._spec, embeds)

    def rotate(self, block: int, heads: Tensor) -> Tensor:
        """Rotary embedding of [1, length, heads, head_dim] (arXiv 2104.09864, eq. 34)."""
        cosine, sine = self._sliding_turns if self._is_sliding(block) else self._turns
        return heads * cosine + self.kernels.rotate_half(heads) * sine

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Extends the cache of a block and attends to all of it."""
        keys, values = getattr(self, f"key_{block}"), getattr(self, f"value_{block}")
        torch.ops.llama.update_cache(key, keys, self._start)
        torch.ops.llama.update_cache(value, values, self._start)
        mask = self._masks.get(self._is_sliding(block))
        softcap = self._spec.decoder.score_softcap
        if softcap is not None and mask is not None:
            return _capped_attention(query, keys, values, mask, softcap)
        attended = torch.ops.llama.custom_sdpa(
            query, keys, values, self._start, mask, 0.0, mask is None
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

    def _is_sliding(self, block: int) -> bool:
        return self._spec.decoder.sliding_of(block) is not None

    def _visible(self, rows: Tensor, input_pos: Tensor) -> dict[bool, Tensor]:
        """What is added to scores [length, capacity], by whether a block is sliding.

        As `graph.visibility.visible_rows`, in operators that have kernels for any length.
        """
        decoder = self._spec.decoder
        slots = (input_pos + torch.arange(rows.shape[1]))[:, None]
        every = torch.arange(self.capacity)[None]
        behind = slots - every
        past = behind >= 0
        visible = {False: past}
        if decoder.sliding is not None:
            visible[True] = past & (behind < decoder.sliding.window)
        if decoder.mutual_rows is not None:
            numbers = rows[0, :, -1:]
            # What an earlier call left behind the rows of this one counts for nothing.
            is_held = every < input_pos + torch.ones_like(slots).sum()
            same = (numbers == self.numbers.view(1, -1)) & (numbers >= 0) & is_held
            visible = {kind: seen | same for kind, seen in visible.items()}
        return {
            kind: torch.where(seen, torch.tensor(0.0), torch.tensor(float("-inf")))
            for kind, seen in visible.items()
        }

    def _positions(self, rows: Tensor, input_pos: Tensor, start: int) -> Tensor:
        """Rotary positions, float32 [1, length], or [1, length, axes] where they have several."""
        if not self._reads_channels:
            return (input_pos + torch.arange(rows.shape[1]))[None].to(torch.float32)
        width = self._spec.row_width
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


def _turns(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [1, length, 1, head_dim]."""
    angles = torch.cat([angles, angles], dim=-1)[:, :, None]
    return angles.cos(), angles.sin()


def _capped_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, softcap: float
) -> Tensor:
    """`graph.visibility.capped_attention` over [1, length, heads, head_dim]; no kernel has it.

    Heads are a dimension of their own throughout: joined with the length, which has no fixed size,
    they cannot be traced.
    """
    shared = query.shape[2] // keys.shape[2]
    key, value = (cache[0].transpose(0, 1).repeat_interleave(shared, 0) for cache in (keys, values))
    scores = query[0].transpose(0, 1) @ key.transpose(1, 2) * query.shape[3] ** -0.5
    scores = torch.tanh(scores / softcap) * softcap + mask
    attended = scores.softmax(dim=-1) @ value
    return attended.transpose(0, 1).contiguous()[None]
