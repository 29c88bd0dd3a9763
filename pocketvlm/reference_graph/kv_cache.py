"""The cache of the reference graph: keys and values, and the states of short convolutions.

It holds what int8 would where scales are given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pocketvlm.weights.kv_cache import KVCacheScales

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of every block, after their rotary positions; grows call by call.

    Args:
        blocks: Indices of the blocks that have attention.
        grid: Scales that keys and values are rounded to as they enter, so that attention sees
            the rounded ones, its own included; `None` to keep them as they are.

    Attributes:
        states: The last rows that each short convolution was given, [batch, rows, width], by the
            index of its block.
    """

    def __init__(self, blocks: Sequence[int], grid: KVCacheScales | None = None) -> None:
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        self._layers = {block: layer for layer, block in enumerate(blocks)}
        self._grid = grid
        self.states: dict[int, Tensor] = {}

    def length(self, block: int) -> int:
        """Rows that a block holds."""
        held = self._rows.get(block)
        return 0 if held is None else held[0].shape[2]

    def rows(self, block: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a block, each [batch, kv_heads, rows, head_dim].

        Raises:
            ValueError: It holds none yet.
        """
        held = self._rows.get(block)
        if held is None:
            raise ValueError(f"block {block} holds no rows")
        return held

    def extend(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends rows [batch, kv_heads, length, head_dim] of a block; returns all there are."""
        if self._grid is not None:
            key, value = self._grid.round(self._layers[block], key, value)
        held = self._rows.get(block)
        if held is not None:
            key, value = torch.cat([held[0], key], dim=2), torch.cat([held[1], value], dim=2)
        self._rows[block] = (key, value)
        return key, value

    def after_past(self, block: int, values: Tensor, rows: int) -> Tensor:
        """Appends values [batch, length, width] to a state of `rows` rows.

        Returns:
            The state before, zeros at the start, and the values after it.
        """
        held = self.states.get(block)
        window = (
            functional.pad(values, (0, 0, rows, 0))
            if held is None
            else torch.cat([held, values], dim=1)
        )
        self.states[block] = window[:, -rows:].clone()
        return window

    def crop(self, block: int, length: int) -> None:
        """Forgets the rows of a block after the first `length`."""
        held = self._rows.get(block)
        if held is not None:
            self._rows[block] = (held[0][:, :, :length], held[1][:, :, :length])
