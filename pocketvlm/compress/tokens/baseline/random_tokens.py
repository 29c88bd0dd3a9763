"""Random tokens: one seeded subset for every image. The baseline that a score has to beat.

On LLaVA-1.5-7B six of eight published methods fall behind it (UniPruneBench, arXiv 2511.02650).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from pocketvlm.compress.tokens.baseline.fixed import Fixed

__all__ = ["RandomTokens", "random_indices"]


def random_indices(count: int, keep: int, seed: int) -> tuple[int, ...]:
    """A subset of `keep` of `count` tokens, ascending; the same on every machine."""
    return tuple(sorted(random.Random(seed).sample(range(count), keep)))


@dataclass(frozen=True, kw_only=True)
class RandomTokens(Fixed):
    """Keeps one random subset, the same of every picture; a baseline.

    Attributes:
        seed: Which subset.
    """

    kind: Literal["random_tokens"] = "random_tokens"
    seed: int = 0

    def indices(self, count: int, keep: int) -> tuple[int, ...]:
        """The subset."""
        return random_indices(count, keep, self.seed)
