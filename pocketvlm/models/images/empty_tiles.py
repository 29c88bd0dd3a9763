"""Empty tiles: those that show a background and nothing on it, by their pixels alone.

A picture that is cut costs a run of the tower and a run of visual tokens for every tile, also for a
margin, a wall or the sky. Such a tile is left out before the tower: the whole picture, which comes
with the tiles, shows it as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pocketvlm.models.images.tilings.tile_grid import TileGrid

__all__ = ["MOST_CONTRAST", "SMALLEST_TILE", "EmptyTiles", "tile_contrast"]

MOST_CONTRAST = 255
"""Levels of a channel, less one."""
SMALLEST_TILE = 8
"""Pixels along an edge of a block, the smallest tile that has a contrast."""


def tile_contrast(tile: npt.NDArray[np.uint8]) -> float:
    """The largest step between the means of neighbouring blocks of 8 x 8 pixels.

    Means ignore grain, and steps between neighbours ignore what changes slowly: shadows and skies.
    The last block of an edge that is not whole blocks overlaps the one before it.

    Args:
        tile: uint8 [height, width, channels], of 8 pixels or more along an edge.

    Returns:
        Levels of a channel, the largest of all channels.
    """
    sums = _block_sums(_block_sums(tile.astype(np.int64), 0), 1)
    steps = [np.abs(np.diff(sums, axis=axis)).max(initial=0) for axis in (0, 1)]
    return float(max(steps)) / SMALLEST_TILE**2


def _block_sums(values: npt.NDArray[np.int64], axis: int) -> npt.NDArray[np.int64]:
    length = values.shape[axis]
    starts = np.minimum(np.arange(0, length, SMALLEST_TILE), length - SMALLEST_TILE)
    before = np.insert(np.cumsum(values, axis=axis), 0, 0, axis=axis)
    sums: npt.NDArray[np.int64] = before.take(starts + SMALLEST_TILE, axis) - before.take(
        starts, axis
    )
    return sums


@dataclass(frozen=True, kw_only=True)
class EmptyTiles:
    """Leaves out tiles that show nothing.

    Attributes:
        contrast: Levels of a channel: a tile whose contrast is less shows nothing.
    """

    contrast: int

    def leave_out(self, grid: TileGrid, tiles: npt.NDArray[np.uint8]) -> TileGrid:
        """The grid of a picture without its empty tiles.

        Args:
            grid: How it is cut.
            tiles: uint8 [all tiles, height, width, channels].
        """
        empty = (part for part in grid.parts if tile_contrast(tiles[part]) < self.contrast)
        return replace(grid, left_out=tuple(empty))
