"""InternVL's tiling: a grid of tiles whose ratio is nearest to that of the picture.

Mini-Monkey cuts a picture once more, by another grid, so that what one grid cuts in two is whole in
a tile of the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from pocketvlm.models.images.tilings.tile_grid import TileGrid, tiles_of_middles

__all__ = ["AspectGrid", "SecondGrid", "TwoGrids"]

_MOST_TILES = 64


@dataclass(frozen=True, kw_only=True)
class SecondGrid:
    """The grid that Mini-Monkey cuts a picture by as well.

    Source: Mini-Monkey, arXiv 2408.02034, section 3.1, and its demonstration, which has the
    defaults and the order of tiles. The grid of the nearest ratio that cuts the picture anywhere
    else than the first does. What is done otherwise: of every number of tiles the nearest grid
    alone is considered, since that is what the library's class can be told.

    Attributes:
        fewest: Tiles of the smallest grids that are considered.
        most: Tiles of the largest.
    """

    fewest: int = 3
    most: int = 7

    def __post_init__(self) -> None:
        if not 2 <= self.fewest <= self.most <= _MOST_TILES:  # noqa: PLR2004  (one tile is not cut)
            raise ValueError(
                f"fewest and most are {self.fewest} and {self.most}; allowed are 2 to "
                f"{_MOST_TILES}, the first no more than the second"
            )


@dataclass(frozen=True, kw_only=True)
class TwoGrids(TileGrid):
    """A picture that is cut by two grids: tiles of the second, those of the first, the whole.

    Attributes:
        second_rows: Tiles of the second grid from top to bottom.
        second_columns: Tiles from left to right.
    """

    second_rows: int
    second_columns: int

    @property
    def second_tiles(self) -> int:
        """Tiles of the second grid."""
        return self.second_rows * self.second_columns

    @property
    def parts(self) -> range:
        """Numbers of the tiles of both grids, which the whole picture shows as well."""
        return range(self.second_tiles + self.rows * self.columns)

    @property
    def all_tiles(self) -> int:
        """Tiles of both grids, and the whole."""
        return len(self.parts) + 1

    def shown_by_whole(self, side: int) -> npt.NDArray[np.int64]:
        """Number of the tile of each grid that shows the middle of each token of the whole."""
        second = tiles_of_middles(self.second_rows, self.second_columns, side)
        first = self.second_tiles + tiles_of_middles(self.rows, self.columns, side)
        return np.stack([second, first])


@dataclass(frozen=True, kw_only=True)
class AspectGrid:
    """InternVL's tiling (arXiv 2404.16821, section 3.3): a grid of the nearest ratio, the whole.

    Attributes:
        side: Pixels along one side of a tile.
        fewest: Tiles of the smallest grids that are considered.
        most: Tiles of the largest.
        shrinks_tiled: Whether the whole picture is made of what was cut, not of the original.
        has_whole: Whether the whole picture comes with its tiles.
        second: What chooses the grid that a picture is cut by as well; `None` for no other.
    """

    shrinks_tiled: ClassVar[bool] = False
    has_whole: ClassVar[bool] = True

    kind: Literal["aspect_grid"] = "aspect_grid"
    side: int
    fewest: int
    most: int
    second: SecondGrid | None = None

    @property
    def most_tiles(self) -> int:
        """Tiles of the picture that costs most."""
        most = TileGrid(columns=self.most).tiles
        return most if self.second is None or self.most == 1 else most + self.second.most

    @property
    def most_edge(self) -> int:
        """Tiles along the longest edge that a picture can have."""
        return self.most

    def grid(self, width: int, height: int) -> TileGrid:
        """The tiles of a picture of this size.

        Of grids that are as near, the one of more tiles wins while the picture has more than half
        of its pixels.
        """
        columns, rows = self._nearest(width, height, self.fewest, self.most)
        second = self.second_grid(width, height)
        if second is None:
            return TileGrid(rows=rows, columns=columns)
        return TwoGrids(rows=rows, columns=columns, second_columns=second[0], second_rows=second[1])

    def second_grid(self, width: int, height: int) -> tuple[int, int] | None:
        """Columns and rows of the second grid of a picture; `None` where it has none."""
        first = self._nearest(width, height, self.fewest, self.most)
        if self.second is None or first == (1, 1):
            return None
        numbers = range(self.second.fewest, self.second.most + 1)
        nearest = (self._nearest(width, height, number, number) for number in numbers)
        # Where both sides divide, all its cuts are cuts of the first grid.
        other = [grid for grid in nearest if first[0] % grid[0] or first[1] % grid[1]]
        return self._nearest_of(other, width, height) if other else None

    def resizes(self, width: int, height: int) -> tuple[tuple[int, int], ...]:
        """Widths and heights that a picture is resized to, one after the other, to be cut."""
        grid = self.grid(width, height)
        return ((grid.columns * self.side, grid.rows * self.side),)

    def grid_numbers(self, width: int, height: int) -> list[tuple[int, int]]:
        """Fewest and most tiles of each grid of a picture, as the library's class is told them."""
        second = self.second_grid(width, height)
        alone = [] if second is None else [(second[0] * second[1],) * 2]
        return [*alone, (self.fewest, self.most)]

    def second_size(self, width: int, height: int) -> tuple[int, int] | None:
        """Width and height that it is resized to once more, for a second grid; or `None`."""
        grid = self.second_grid(width, height)
        return None if grid is None else (grid[0] * self.side, grid[1] * self.side)

    def limited(self, max_tiles: int) -> AspectGrid:
        """The same with no more tiles, the whole picture among them where there are several.

        Raises:
            ValueError: There is a second grid.
        """
        if self.most_tiles <= max_tiles:
            return self
        if self.second is not None:
            raise ValueError("pictures are cut by a second grid as well; limit tiles before it")
        most = max(1, max_tiles - 1)
        if TileGrid(columns=most).tiles > max_tiles:
            most = 1
        return replace(self, most=most, fewest=min(self.fewest, most))

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the library's image processor is told, and what this package alone follows."""
        second = {} if self.second is None else {"second_grid": asdict(self.second)}
        return {"min_patches": self.fewest, "max_patches": self.most, **second}

    def _nearest(self, width: int, height: int, fewest: int, most: int) -> tuple[int, int]:
        """Columns and rows of the grid with `fewest` to `most` tiles whose ratio is nearest."""
        edges = range(1, most + 1)
        grids = [(columns, rows) for columns in edges for rows in edges]
        allowed = range(fewest, most + 1)
        return self._nearest_of(
            sorted(
                (grid for grid in grids if grid[0] * grid[1] in allowed),
                key=lambda grid: grid[0] * grid[1],  # the smallest first, narrow before wide
            ),
            width,
            height,
        )

    def _nearest_of(
        self, grids: Iterable[tuple[int, int]], width: int, height: int
    ) -> tuple[int, int]:
        ratio, best, nearest = width / height, (1, 1), math.inf
        for columns, rows in grids:
            distance = abs(ratio - columns / rows)
            is_filled = width * height > 0.5 * self.side * self.side * columns * rows
            if distance < nearest or (distance == nearest and is_filled):
                best, nearest = (columns, rows), distance
        return best
