"""The grid of an int8 KV cache: one scale for each layer, head and channel.

It travels with the checkpoint, as the weights' codes do: torch rounds what it caches on this grid,
an exporter hands the same scales to its runtime, and neither knows which stage chose them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["KVCacheScales"]


@dataclass(frozen=True, kw_only=True, eq=False)
class KVCacheScales:
    """Symmetric int8: a cached number is scale * code, the code in [-128, 127].

    Attributes:
        keys: Scales of rotated keys, float32 [layers, kv_heads, head_dim], of layers that have
            attention.
        values: Scales of values, likewise.
    """

    bits: ClassVar[int] = 8

    keys: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        if self.keys.shape != self.values.shape or self.keys.ndim != 3:  # noqa: PLR2004  (layers, heads, channels)
            raise ValueError(
                f"scales are {tuple(self.keys.shape)} and {tuple(self.values.shape)}, not twice "
                "[layers, kv_heads, head_dim]"
            )
        for scales in (self.keys, self.values):
            if scales.dtype != torch.float32 or not bool((scales > 0).all()):
                raise ValueError("scales of a KV cache are positive float32 numbers")

    @classmethod
    def from_ranges(cls, keys: Tensor, values: Tensor) -> KVCacheScales:
        """The grid that spans the largest magnitudes, each [layers, kv_heads, head_dim]."""
        least = torch.finfo(torch.float32).tiny  # a channel that is always zero
        return cls(keys=(keys / 127).clamp_min(least), values=(values / 127).clamp_min(least))

    def round(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What the cache holds of keys and values [batch, kv_heads, rows, head_dim]."""
        return _round(keys, self.keys[layer]), _round(values, self.values[layer])

    def to_tensors(self) -> dict[str, Tensor]:
        """What is stored, by the name of the field."""
        return {"keys": self.keys, "values": self.values}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> KVCacheScales:
        """Undoes `to_tensors`."""
        return cls(keys=tensors["keys"], values=tensors["values"])


def _round(states: Tensor, scales: Tensor) -> Tensor:
    steps = scales[:, None, :]
    return (states / steps).round().clamp(-128, 127) * steps
