"""A transformers cache that holds what an int8 cache would."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache

from pocketvlm.cache_grid import CacheGrid

__all__ = ["RoundedCache"]


class RoundedCache(DynamicCache):
    """Rounds keys and values as they enter; attention sees the rounded ones, its own included."""

    def __init__(self, grid: CacheGrid) -> None:
        super().__init__()
        self._grid = grid

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends the rows of one layer, rounded, and returns all there are."""
        keys, values = self._grid.round(layer_idx, key_states, value_states)
        updated: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        return updated
