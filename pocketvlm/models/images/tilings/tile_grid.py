"""The tiles of one picture, and what they cost in a prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from pocketvlm.models.images.tilings.row_order import RowOrder

__all__ = ["ONE_TILE", "TileGrid", "tiles_of_middles"]


def tiles_of_middles(rows: int, columns: int, side: int) -> npt.NDArray[np.int64]:
    """Tiles of a grid, row by row from 0, that the middles of `side` x `side` tokens lie in."""
    middles = 2 * np.arange(side) + 1
    lines, places = (middles * count // (2 * side) for count in (rows, columns))
    return (lines[:, None] * columns + places).ravel()


@dataclass(frozen=True, kw_only=True)
class TileGrid:
    """How one picture is cut.

    Attributes:
        rows: Tiles from top to bottom.
        columns: Tiles from left to right.
        has_whole: Whether the whole picture follows its tiles, where there are several.
        left_out: Tiles that are not seen, ascending, by their numbers in the order of all; never
            the whole picture.
    """

    rows: int = 1
    columns: int = 1
    has_whole: bool = True
    left_out: tuple[int, ...] = ()

    @property
    def is_split(self) -> bool:
        """Whether there are several tiles."""
        return self.rows * self.columns > 1

    @property
    def is_map(self) -> bool:
        """Whether the tiles make up one map of rows again, as `order` says."""
        return False

    @property
    def parts(self) -> range:
        """Numbers of the tiles that the whole picture shows as well; none where it does not."""
        return range(self.rows * self.columns if self.is_split and self.has_whole else 0)

    @property
    def all_tiles(self) -> int:
        """Tiles that the picture is cut into, the whole among them."""
        return self.rows * self.columns + int(self.is_split and self.has_whole)

    @property
    def whole(self) -> int:
        """Number of the tile that shows the whole picture, where one does."""
        return next(number for number in range(self.all_tiles) if number not in self.parts)

    @property
    def complete(self) -> Self:
        """The same with every tile."""
        return replace(self, left_out=())

    @property
    def seen(self) -> list[int]:
        """Numbers of the tiles that the tower sees, ascending."""
        return [number for number in range(self.all_tiles) if number not in self.left_out]

    @property
    def tiles(self) -> int:
        """Pictures that the tower sees."""
        return self.all_tiles - len(self.left_out)

    def placeholders(self, per_tile: int) -> int:
        """Placeholders of the picture in a prompt, where one tile has `per_tile` visual tokens.

        Tiles that are left out have theirs too: what they stood for is dropped, as by a reduction.
        """
        return self.all_tiles * per_tile

    def most_rows(self, per_tile: int, kept: int, whole: int | None = None) -> int:
        """Rows of the decoder, at most, where `kept` of a tile's `per_tile` tokens are left.

        Args:
            per_tile: Tokens of a tile before reduction.
            kept: Tokens of a tile after it, on average.
            whole: Tokens of the whole picture after it; `None` for as many as of a tile.
        """
        del per_tile
        return self._kept_rows(kept, whole)

    def least_rows(self, per_tile: int, kept: int, whole: int | None = None) -> int:
        """Rows of the decoder, at least; arguments are those of `most_rows`."""
        return self.most_rows(per_tile, kept, whole)

    def shown_by_whole(self, side: int) -> npt.NDArray[np.int64]:
        """Number of the tile that shows the middle of each token of the whole picture.

        Args:
            side: Tokens along an edge of the whole picture.

        Returns:
            int64 [grids, side * side]: a tile for each of the grids that the picture is cut into.
        """
        return tiles_of_middles(self.rows, self.columns, side)[None]

    def _kept_rows(self, kept: int, whole: int | None) -> int:
        wholes = self.all_tiles - len(self.parts)
        return (self.tiles - wholes) * kept + wholes * (kept if whole is None else whole)

    def order(self, per_tile: int) -> RowOrder | None:
        """How rows of the tiles follow each other; `None` where tile follows tile."""
        del per_tile
        return None


ONE_TILE = TileGrid()
"""A picture that is not cut."""
