"""Uniform stride: every (N / k)-th token in raster order. A baseline that looks at nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pocketvlm.compress.tokens.baseline.fixed import Fixed

__all__ = ["UniformStride", "uniform_indices"]


def uniform_indices(count: int, keep: int) -> tuple[int, ...]:
    """The middle token of each of `keep` equal stretches of `count` tokens, ascending."""
    return tuple((2 * index + 1) * count // (2 * keep) for index in range(keep))


@dataclass(frozen=True, kw_only=True)
class UniformStride(Fixed):
    """Keeps the middle of each of k equal stretches; a baseline."""

    kind: Literal["uniform_stride"] = "uniform_stride"

    def indices(self, count: int, keep: int) -> tuple[int, ...]:
        """The middles."""
        return uniform_indices(count, keep)
