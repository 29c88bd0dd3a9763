"""Any resolution, as LLaVA-NeXT and LLaVA-OneVision cut pictures (arXiv 2310.03744, 2408.03326).

A picture is fitted into the best of some resolutions, its ratio kept, black around it; the whole
picture comes first, then the tiles. Of the features a map is put together again, the border cut off
and a learned row set behind each line. All roundings are the library's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isqrt
from typing import Any, Literal

import numpy as np

from pocketvlm.models.images.tilings.row_order import LINE_BREAK, RowOrder
from pocketvlm.models.images.tilings.tile_grid import TileGrid

__all__ = ["Anyres", "MapGrid"]


@dataclass(frozen=True, kw_only=True)
class MapGrid(TileGrid):
    """A picture as a whole, and as tiles that make up one map.

    Attributes:
        picture: Its width and height.
    """

    picture: tuple[int, int]

    @property
    def tiles(self) -> int:
        """Pictures that the tower sees."""
        return 1 + self.rows * self.columns

    def placeholders(self, per_tile: int) -> int:
        """Placeholders of the picture in a prompt."""
        height, width = self._lines(isqrt(per_tile))
        return per_tile + height * (width + 1)

    def most_rows(self, per_tile: int, kept: int) -> int:
        """Rows of the decoder, at most: a reduction may keep what the border takes away, or not."""
        height, _ = self._lines(isqrt(per_tile))
        return min(self.placeholders(per_tile), self.tiles * kept + height)

    def order(self, per_tile: int) -> RowOrder:
        """The whole picture row by row, then the map line by line, each with a break behind it."""
        return _order(self, per_tile)

    def _lines(self, side: int) -> tuple[int, int]:
        """Lines of the map and their length, without the border, for tiles of `side` tokens."""
        height, width = self.rows * side, self.columns * side
        top, left = self.border(side)
        return height - 2 * top, width - 2 * left

    def border(self, side: int) -> tuple[int, int]:
        """Lines above and below the picture, and columns at its sides, that show black alone."""
        own_width, own_height = self.picture
        height, width = self.rows * side, self.columns * side
        if own_width / own_height > width / height:
            return (height - int(round(own_height * (width / own_width), 7))) // 2, 0
        return 0, (width - int(round(own_width * (height / own_height), 7))) // 2


@lru_cache(maxsize=64)
def _order(grid: MapGrid, per_tile: int) -> RowOrder:
    side = isqrt(per_tile)
    tokens = per_tile + np.arange(grid.rows * grid.columns * per_tile)
    tiles = tokens.reshape(grid.rows, grid.columns, side, side)
    whole = tiles.swapaxes(1, 2).reshape(grid.rows * side, grid.columns * side)
    top, left = grid.border(side)
    shown = whole[top : len(whole) - top, left : whole.shape[1] - left]
    lines = np.pad(shown, ((0, 0), (0, 1)), constant_values=LINE_BREAK)
    return RowOrder(
        sources=np.concatenate([np.arange(per_tile), lines.ravel()]),
        before=per_tile,
        line=lines.shape[1],
    )


@dataclass(frozen=True, kw_only=True)
class Anyres:
    """The tiling.

    Attributes:
        side: Pixels along one side of a tile.
        resolutions: Heights and widths that a picture may be fitted into, whole tiles both.
    """

    kind: Literal["anyres"] = "anyres"
    side: int
    resolutions: tuple[tuple[int, int], ...]

    @property
    def most_tiles(self) -> int:
        """Tiles of the picture that costs most."""
        return max(map(self._tiles, self.resolutions))

    @property
    def most_edge(self) -> int:
        """Tiles along the longest edge that a picture can have."""
        return max(map(max, self.resolutions)) // self.side

    @property
    def settings(self) -> Mapping[str, Any]:
        """What a processor is told of it."""
        return {"image_grid_pinpoints": [list(size) for size in self.resolutions]}

    def limited(self, max_tiles: int) -> Anyres:
        """The same with the resolutions alone that have no more tiles.

        Raises:
            ValueError: There are none.
        """
        if self.most_tiles <= max_tiles:
            return self
        few = tuple(size for size in self.resolutions if self._tiles(size) <= max_tiles)
        if not few:
            fewest = min(map(self._tiles, self.resolutions))
            raise ValueError(f"every picture of this model is cut into {fewest} or more")
        return replace(self, resolutions=few)

    def grid(self, width: int, height: int) -> MapGrid:
        """The tiles of a picture of this size."""
        best = self.resolution(width, height)
        return MapGrid(
            rows=best[0] // self.side, columns=best[1] // self.side, picture=(width, height)
        )

    def resolution(self, width: int, height: int) -> tuple[int, int]:
        """Height and width that it is fitted into: most of its pixels, then least around them."""

        def merit(size: tuple[int, int]) -> tuple[int, int]:
            scale = min(size[1] / width, size[0] / height)
            fitted = min(int(width * scale) * int(height * scale), width * height)
            return fitted, fitted - size[0] * size[1]

        return max(self.resolutions, key=merit)

    def fitted_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the picture inside that resolution."""
        high, wide = self.resolution(width, height)
        across, down = wide / width, high / height
        if across < down:
            return wide, min(math.ceil(height * across), high)
        return min(math.ceil(width * down), wide), high

    def _tiles(self, size: tuple[int, int]) -> int:
        return 1 + (size[0] // self.side) * (size[1] // self.side)
