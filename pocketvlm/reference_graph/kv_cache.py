"""The KV cache of the reference graph; it holds what int8 would where scales are given."""

from __future__ import annotations

import torch
from torch import Tensor

from pocketvlm.weights.kv_cache import KVCacheScales

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of every block, after their rotary positions; grows call by call.

    Args:
        depth: Blocks of the decoder.
        grid: Scales that keys and values are rounded to as they enter, so that attention sees
            the rounded ones, its own included; `None` to keep them as they are.
    """

    def __init__(self, depth: int, grid: KVCacheScales | None = None) -> None:
        self._rows: list[tuple[Tensor, Tensor] | None] = [None] * depth
        self._grid = grid

    def length(self, block: int) -> int:
        """Rows that a block holds."""
        held = self._rows[block]
        return 0 if held is None else held[0].shape[2]

    def rows(self, block: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a block, each [batch, kv_heads, rows, head_dim].

        Raises:
            ValueError: It holds none yet.
        """
        held = self._rows[block]
        if held is None:
            raise ValueError(f"block {block} holds no rows")
        return held

    def extend(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends rows [batch, kv_heads, length, head_dim] of a block; returns all there are."""
        if self._grid is not None:
            key, value = self._grid.round(block, key, value)
        held = self._rows[block]
        if held is not None:
            key, value = torch.cat([held[0], key], dim=2), torch.cat([held[1], value], dim=2)
        self._rows[block] = (key, value)
        return key, value

    def crop(self, block: int, length: int) -> None:
        """Forgets the rows of a block after the first `length`."""
        held = self._rows[block]
        if held is not None:
            self._rows[block] = (held[0][:, :, :length], held[1][:, :, :length])
