"""What every method of visual-token reduction is told."""

from __future__ import annotations

from dataclasses import dataclass

from pocketvlm.models.reducer import PositionPolicy

__all__ = ["ReducerOptions"]


@dataclass(frozen=True, kw_only=True)
class ReducerOptions:
    """The stage's configuration, resolved for one model.

    Attributes:
        keep: Visual tokens that remain, k.
        positions: Which rotary positions they get.
        seed: For methods that draw at random.
    """

    keep: int
    positions: PositionPolicy
    seed: int = 0
