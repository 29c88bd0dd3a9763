"""LFM2-VL's tiling: small pictures stay whole, large ones are cut into a grid of the nearest ratio.

Stock gives a picture that stays whole, and the whole picture after tiles, a size of their own
between two numbers of tokens. A bundle's vision graph has one size, so that both are fitted to a
tile here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pocketvlm.models.images.tilings.aspect_grid import AspectGrid
from pocketvlm.models.images.tilings.tile_grid import ONE_TILE, TileGrid

__all__ = ["LargeGrid"]


@dataclass(frozen=True, kw_only=True)
class LargeGrid:
    """The tiling of LFM2-VL (arXiv 2511.23404).

    Attributes:
        side: Pixels along one side of a tile.
        fewest: Tiles of the smallest grids that are considered for a large picture.
        most: Tiles of the largest.
        patch: Pixels along one side of a patch.
        unit: Pixels along one side of a visual token.
        most_pixels: Pixels of the largest picture that is not cut, edges rounded to units.
        has_whole: Whether the whole picture follows its tiles.
        shrinks_tiled: Whether the whole picture is made of what was cut, not of the original.
    """

    shrinks_tiled: ClassVar[bool] = False

    kind: Literal["large_grid"] = "large_grid"
    side: int
    fewest: int
    most: int
    patch: int
    unit: int
    most_pixels: float
    has_whole: bool

    @property
    def most_tiles(self) -> int:
        """Tiles of the picture that costs most."""
        return TileGrid(columns=self.most, has_whole=self.has_whole).tiles

    @property
    def most_edge(self) -> int:
        """Tiles along the longest edge that a picture can have."""
        return self.most

    def is_large(self, width: int, height: int) -> bool:
        """Whether a picture of this size is cut."""
        width, height = (
            max(self.patch, round(edge / self.unit) * self.unit) for edge in (width, height)
        )
        return width * height > self.most_pixels

    def grid(self, width: int, height: int) -> TileGrid:
        """The tiles of a picture of this size."""
        if not self.is_large(width, height):
            return ONE_TILE
        grid = AspectGrid(side=self.side, fewest=self.fewest, most=self.most).grid(width, height)
        return replace(grid, has_whole=self.has_whole)

    def resizes(self, width: int, height: int) -> tuple[tuple[int, int], ...]:
        """Widths and heights that a picture is resized to, one after the other, to be cut."""
        grid = self.grid(width, height)
        return ((grid.columns * self.side, grid.rows * self.side),)

    def limited(self, max_tiles: int) -> LargeGrid:
        """The same with no more tiles, the whole picture among them where there are several."""
        if self.most_tiles <= max_tiles:
            return self
        most = max(1, max_tiles - int(self.has_whole))
        return replace(self, most=most, fewest=min(self.fewest, most))

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the library's image processor is told, to cut pictures in this way."""
        return {"min_tiles": self.fewest, "max_tiles": self.most}
