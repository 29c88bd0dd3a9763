"""BlueLM-V's relaxed matching: a larger grid only where it shows clearly more of the picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["RelaxedRatio"]


@dataclass(frozen=True, kw_only=True)
class RelaxedRatio:
    """The grid that shows most of the picture's pixels, give or take a share.

    Source: BlueLM-V-3B, arXiv 2411.10640, section 3.2. A picture that is fitted into a grid, its
    ratio kept, has an effective area, at most its own; the rest is wasted. From the largest grid
    to the smallest, one takes the place of the best so far if its effective area is larger by more
    than `alpha`, or if it is smaller by no more and wastes less. The paper says by less; so 0 is
    LLaVA-NeXT's rule.

    Attributes:
        alpha: The share, from 0 to 1.
    """

    kind: Literal["relaxed_ratio"] = "relaxed_ratio"
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; allowed are 0 to 1")

    def choose(
        self, width: int, height: int, grids: Iterable[tuple[int, int]], side: int
    ) -> tuple[int, int]:
        """Rows and columns for a picture.

        Args:
            width: Of the picture, in pixels.
            height: Likewise.
            grids: Rows and columns of those that there are.
            side: Pixels along one side of a tile.
        """
        largest_first = sorted(grids, key=lambda grid: grid[0] * grid[1], reverse=True)
        best, best_shown, best_wasted = largest_first[0], 0, math.inf
        for rows, columns in largest_first:
            scale = min(side * columns / width, side * rows / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            wasted = side * side * rows * columns - shown
            margin = self.alpha * best_shown
            is_larger = shown - best_shown > margin
            if is_larger or (best_shown - shown <= margin and wasted < best_wasted):
                best, best_shown, best_wasted = (rows, columns), shown, wasted
        return best
