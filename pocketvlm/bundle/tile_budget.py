"""How many visual tokens each tile of a cut picture has: the numbers of a bundle's vision graphs.

The whole picture, which shows where things are, may be seen finer than its tiles, and a tile that
shows more finer than others. What a tile shows is known from its pixels before the tower runs, or
from the tokens that a reduction left of the whole picture, which is then encoded first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["TileBudget", "share_out"]


@dataclass(frozen=True, kw_only=True)
class TileBudget:
    """Visual tokens of the tiles of a picture.

    Attributes:
        whole: Tokens of the whole picture; a picture that is not cut is a whole one.
        tile: Tokens of a tile; on average, and at most, where tiles differ.
        levels: Numbers that a tile may have, ascending.
        by: What tells tiles from each other: nothing, the detail of their pixels, or how many of
            the whole picture's kept tokens show them.
    """

    whole: int
    tile: int
    levels: tuple[int, ...]
    by: Literal["nothing", "detail", "whole_tokens"]

    def __post_init__(self) -> None:
        levels = self.levels
        if not levels or levels[0] < 1 or list(levels) != sorted(set(levels)):
            raise ValueError(f"levels are {levels}; needed are numbers from 1 on, ascending")
        if self.by == "nothing" and levels != (self.tile,):
            raise ValueError(f"levels are {levels}, and every tile has {self.tile} tokens")
        if not levels[0] <= self.tile <= levels[-1]:
            raise ValueError(f"tile is {self.tile}; levels allow {levels[0]} to {levels[-1]}")

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of tokens that there must be vision graphs for, ascending."""
        return tuple(sorted({self.whole, *self.levels}))

    def describe(self) -> str:
        """The budget in words, such as `whole 32, tiles 16 each`."""
        if self.by == "nothing":
            return f"whole {self.whole}, tiles {self.tile} each"
        source = "their detail" if self.by == "detail" else "what the whole picture keeps of them"
        return (
            f"whole {self.whole}, tiles {self.tile} on average, "
            f"{' or '.join(map(str, self.levels))} by {source}"
        )


def share_out(importance: Sequence[int], levels: Sequence[int], average: int) -> list[int]:
    """Tokens of tiles in proportion to their importance, in steps and within a sum.

    All begin with the fewest. The next step goes to the tile with the most importance per token
    half-way up it, of equals to the one with fewer tokens, then to the first, as long as a step
    fits: Sainte-Lague's apportionment, which favours neither many nor few, with unequal steps.

    Args:
        importance: Of each tile, at least 0.
        levels: Numbers that a tile may have, ascending.
        average: Tokens per tile that are there to share, at least the fewest.
    """
    steps = [0] * len(importance)
    left = len(steps) * (average - levels[0])
    while True:
        fitting = [
            (-importance[tile] / (levels[step] + levels[step + 1]), step, tile)
            for tile, step in enumerate(steps)
            if step + 1 < len(levels) and levels[step + 1] - levels[step] <= left
        ]
        if not fitting:
            return [levels[step] for step in steps]
        _, step, tile = min(fitting)
        steps[tile] += 1
        left -= levels[step + 1] - levels[step]
