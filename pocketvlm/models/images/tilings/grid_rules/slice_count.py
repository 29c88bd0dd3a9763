"""LLaVA-UHD's rule: as many tiles as a picture has pixels for, in the ratio nearest to its own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["SliceCount"]


@dataclass(frozen=True, kw_only=True)
class SliceCount:
    """About the ideal number of tiles, so that none is enlarged or shrunk by much.

    Source: LLaVA-UHD, arXiv 2403.11703, section 3.1. Of a picture of the area of N tiles, rounded
    up, grids of N - 1, N and N + 1 tiles are considered, and the one is taken whose ratio is
    nearest to the picture's, as a logarithm. A picture of no more than one tile is not cut. N is at
    most what the model has; where it has no such grid, those of the nearest numbers are considered.
    """

    kind: Literal["slice_count"] = "slice_count"

    def choose(
        self, width: int, height: int, grids: Iterable[tuple[int, int]], side: int
    ) -> tuple[int, int]:
        """Rows and columns for a picture; arguments are those of `RelaxedRatio.choose`."""
        by_size = sorted(grids, key=lambda grid: (grid[0] * grid[1], grid))
        most = by_size[-1][0] * by_size[-1][1]
        ideal = min(math.ceil(width * height / side**2), most)

        def badness(grid: tuple[int, int]) -> tuple[int, float]:
            tiles = grid[0] * grid[1]
            away = abs(tiles - ideal)
            is_whole = (tiles == 1) != (ideal == 1)
            beyond = away + 1 if is_whole else max(0, away - 1)
            return beyond, abs(math.log(width / height) - math.log(grid[1] / grid[0]))

        return min(by_size, key=badness)
