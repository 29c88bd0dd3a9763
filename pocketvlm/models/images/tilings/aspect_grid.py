"""InternVL's tiling: a grid of tiles whose ratio is nearest to that of the picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pocketvlm.models.images.tilings.tile_grid import ONE_TILE, TileGrid

__all__ = ["AspectGrid"]


@dataclass(frozen=True, kw_only=True)
class AspectGrid:
    """InternVL's tiling (arXiv 2404.16821, section 3.3): a grid of the nearest ratio, the whole.

    Attributes:
        side: Pixels along one side of a tile.
        fewest: Tiles of the smallest grids that are considered.
        most: Tiles of the largest.
        shrinks_tiled: Whether the whole picture is made of what was cut, not of the original.
        has_whole: Whether the whole picture comes with its tiles.
    """

    shrinks_tiled: ClassVar[bool] = False
    has_whole: ClassVar[bool] = True

    kind: Literal["aspect_grid"] = "aspect_grid"
    side: int
    fewest: int
    most: int

    @property
    def most_tiles(self) -> int:
        """Tiles of the picture that costs most."""
        return TileGrid(columns=self.most).tiles

    @property
    def most_edge(self) -> int:
        """Tiles along the longest edge that a picture can have."""
        return self.most

    def grid(self, width: int, height: int) -> TileGrid:
        """The tiles of a picture of this size.

        Of grids that are as near, the one of more tiles wins while the picture has more than half
        of its pixels.
        """
        ratio, best, nearest = width / height, ONE_TILE, math.inf
        for columns, rows in self._grids():
            distance = abs(ratio - columns / rows)
            is_filled = width * height > 0.5 * self.side * self.side * columns * rows
            if distance < nearest or (distance == nearest and is_filled):
                best, nearest = TileGrid(rows=rows, columns=columns), distance
        return best

    def resizes(self, width: int, height: int) -> tuple[tuple[int, int], ...]:
        """Widths and heights that a picture is resized to, one after the other, to be cut."""
        grid = self.grid(width, height)
        return ((grid.columns * self.side, grid.rows * self.side),)

    def limited(self, max_tiles: int) -> AspectGrid:
        """The same with no more tiles, the whole picture among them where there are several."""
        if self.most_tiles <= max_tiles:
            return self
        most = max(1, max_tiles - 1)
        if TileGrid(columns=most).tiles > max_tiles:
            most = 1
        return replace(self, most=most, fewest=min(self.fewest, most))

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the library's image processor is told, to cut pictures in this way."""
        return {"min_patches": self.fewest, "max_patches": self.most}

    def _grids(self) -> list[tuple[int, int]]:
        """Columns and rows of all grids, the smallest first, narrow before wide."""
        edges = range(1, self.most + 1)
        grids = [(columns, rows) for columns in edges for rows in edges]
        allowed = range(self.fewest, self.most + 1)
        return sorted(
            (grid for grid in grids if grid[0] * grid[1] in allowed),
            key=lambda grid: grid[0] * grid[1],
        )
