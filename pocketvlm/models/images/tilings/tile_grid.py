"""The tiles of one picture, and what they cost in a prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from pocketvlm.models.images.tilings.row_order import RowOrder

__all__ = ["ONE_TILE", "TileGrid"]


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

    def most_rows(self, per_tile: int, kept: int) -> int:
        """Rows of the decoder, at most, where `kept` of a tile's `per_tile` tokens are left."""
        del per_tile
        return self.tiles * kept

    def order(self, per_tile: int) -> RowOrder | None:
        """How rows of the tiles follow each other; `None` where tile follows tile."""
        del per_tile
        return None


ONE_TILE = TileGrid()
"""A picture that is not cut."""
