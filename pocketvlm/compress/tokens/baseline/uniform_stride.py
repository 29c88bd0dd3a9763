"""Uniform stride: every (N / k)-th token in raster order. A baseline that looks at nothing."""

from __future__ import annotations

from pocketvlm.compress.tokens.baseline.fixed import FixedReducer
from pocketvlm.compress.tokens.options import ReducerOptions
from pocketvlm.models.spec import ModelSpec

__all__ = ["build", "uniform_indices"]


def uniform_indices(count: int, keep: int) -> tuple[int, ...]:
    """The middle token of each of `keep` equal stretches of `count` tokens, ascending."""
    return tuple((2 * index + 1) * count // (2 * keep) for index in range(keep))


def build(spec: ModelSpec, options: ReducerOptions) -> FixedReducer:
    """The reducer of one model."""
    return FixedReducer(
        uniform_indices(spec.visual_tokens, options.keep), positions=options.positions
    )
