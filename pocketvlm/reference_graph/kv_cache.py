"""The KV cache of a stock decoder: how it is handed over, and one that holds what int8 would."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

from pocketvlm.weights.kv_cache import KVCacheScales

__all__ = ["QuantizedDynamicCache", "cache_argument"]


class QuantizedDynamicCache(DynamicCache):
    """Rounds keys and values as they enter; attention sees the rounded ones, its own included."""

    def __init__(self, grid: KVCacheScales) -> None:
        super().__init__()
        self._grid = grid

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends the rows of one layer, rounded, and returns all there are."""
        keys, values = self._grid.round(layer_idx, key_states, value_states)
        updated: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        return updated


def cache_argument(module: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache to a decoder or to one of its attentions.

    The signature decides, not the version: a family may follow a renaming later than others do.

    Args:
        module: A module of transformers whose `forward` takes a cache.
        cache: A transformers cache, or `None`.

    Returns:
        `{"cache": cache}`, or `{"past_key_values": cache}` before transformers 5.24.
    """
    names = inspect.signature(module.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}
