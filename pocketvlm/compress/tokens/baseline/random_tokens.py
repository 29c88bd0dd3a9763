"""Random tokens: one seeded subset for every image. The baseline that a score has to beat.

On LLaVA-1.5-7B six of eight published methods fall behind it (UniPruneBench, arXiv 2511.02650).
"""

from __future__ import annotations

import random

from pocketvlm.compress.tokens.baseline.fixed import FixedReducer
from pocketvlm.compress.tokens.options import ReducerOptions
from pocketvlm.models.spec import ModelSpec

__all__ = ["build", "random_indices"]


def random_indices(count: int, keep: int, seed: int) -> tuple[int, ...]:
    """A subset of `keep` of `count` tokens, ascending; the same on every machine."""
    return tuple(sorted(random.Random(seed).sample(range(count), keep)))


def build(spec: ModelSpec, options: ReducerOptions) -> FixedReducer:
    """The reducer of one model."""
    return FixedReducer(
        random_indices(spec.visual_tokens, options.keep, options.seed), positions=options.positions
    )
