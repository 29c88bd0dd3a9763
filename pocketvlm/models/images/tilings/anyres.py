"""Any resolution, as LLaVA-NeXT and LLaVA-OneVision cut pictures (arXiv 2310.03744, 2408.03326).

A picture is fitted into the best of some resolutions, its ratio kept, black around it; the whole
picture comes first, then the tiles. Of the features a map is put together again: the border is cut
off, what is too large made smaller, and a learned row set after each line. All roundings are the
library's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isqrt
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from pocketvlm.models.images.tilings.grid_rules import GridRule, rule_settings
from pocketvlm.models.images.tilings.row_order import LINE_BREAK, RowOrder
from pocketvlm.models.images.tilings.tile_grid import TileGrid

__all__ = ["Anyres", "MapGrid"]

_TOO_LARGE = 1.1
_Places = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class MapGrid(TileGrid):
    """A picture as a whole, and as tiles that make up one map; without tiles, the whole is the map.

    Attributes:
        picture: Its width and height.
        most_area: Tokens of a map in tiles: one that has much more is made smaller; `None` for all.
    """

    picture: tuple[int, int]
    most_area: int | None = None

    @property
    def is_map(self) -> bool:
        """Whether the tiles make up one map."""
        return True

    @property
    def parts(self) -> range:
        """Numbers of the tiles, which the whole picture comes before."""
        return range(1, self.all_tiles)

    @property
    def all_tiles(self) -> int:
        """Tiles that the picture is cut into, the whole among them."""
        return 1 + self.rows * self.columns

    def placeholders(self, per_tile: int) -> int:
        """Placeholders of the picture in a prompt."""
        height, width = self._lines(isqrt(per_tile))
        return per_tile + height * (width + 1) if self.rows else per_tile + 1

    def most_rows(self, per_tile: int, kept: int, whole: int | None = None) -> int:
        """Rows of the decoder, at most: a reduction may keep what the border takes away, or not."""
        height, _ = self._lines(isqrt(per_tile))
        return min(self.placeholders(per_tile), self._kept_rows(kept, whole) + max(height, 1))

    def least_rows(self, per_tile: int, kept: int, whole: int | None = None) -> int:
        """Rows of the decoder, at least: as if a reduction took nothing of the border away."""
        height, width = self._lines(isqrt(per_tile))
        of_whole = kept if whole is None else whole
        seen = self.tiles - 1
        left = max(height * width - per_tile * len(self.parts) + kept * seen, 0)
        return of_whole + (left + -(-left // width) if self.rows else 1)

    def shown_by_whole(self, side: int) -> npt.NDArray[np.int64]:
        """Number of the tile that shows the middle of each token of the whole, borders left out."""
        middles = 2 * np.arange(side) + 1
        lines, places = (
            (middles * (count * side - 2 * before) + 2 * side * before) // (2 * side**2)
            for count, before in zip((self.rows, self.columns), self.border(side), strict=True)
        )
        return (1 + lines[:, None] * self.columns + places).reshape(1, -1)

    def order(self, per_tile: int) -> RowOrder:
        """The whole picture row by row, then the map line by line, each with a break after it."""
        return _order(self, per_tile)

    def border(self, side: int) -> tuple[int, int]:
        """Lines above and below the picture, and columns at its sides, that show black alone."""
        own_width, own_height = self.picture
        height, width = self.rows * side, self.columns * side
        if own_width / own_height > width / height:
            return (height - int(round(own_height * (width / own_width), 7))) // 2, 0
        return 0, (width - int(round(own_width * (height / own_height), 7))) // 2

    def shrunk(self, height: int, width: int, side: int) -> tuple[int, int]:
        """Lines of a map and their length after it was made smaller, where it is too large."""
        if self.most_area is None:
            return height, width
        ratio = math.sqrt(height * width / (self.most_area * side**2))
        if ratio <= _TOO_LARGE:
            return height, width
        return int(height // ratio), int(width // ratio)

    def _lines(self, side: int) -> tuple[int, int]:
        """Lines of the map and their length, for tiles of `side` tokens; none without tiles."""
        if not self.rows:
            return 0, 0
        top, left = self.border(side)
        return self.shrunk(self.rows * side - 2 * top, self.columns * side - 2 * left, side)


@lru_cache(maxsize=64)
def _order(grid: MapGrid, per_tile: int) -> RowOrder:
    side = isqrt(per_tile)
    whole = np.arange(per_tile)
    if not grid.rows:
        sources = np.append(whole, LINE_BREAK)[:, None]
        return RowOrder(sources=sources, before=0, line=per_tile + 1, seen=grid.seen)
    tiles = (per_tile + np.arange(grid.rows * grid.columns * per_tile)).reshape(
        grid.rows, grid.columns, side, side
    )
    tokens = tiles.swapaxes(1, 2).reshape(grid.rows * side, grid.columns * side)
    top, left = grid.border(side)
    tokens = tokens[top : len(tokens) - top, left : tokens.shape[1] - left]
    height, width = grid.shrunk(*tokens.shape, side)
    if (height, width) == tokens.shape:
        mixed, weights = tokens[..., None], None
    else:
        mixed, weights = _mix(tokens, height, width)
    lines = np.pad(mixed, ((0, 0), (0, 1), (0, 0)), constant_values=LINE_BREAK)
    count = mixed.shape[2]
    sources = np.concatenate([np.tile(whole[:, None], count), lines.reshape(-1, count)])
    if weights is not None:
        alone = np.eye(1, count, dtype=np.float32)
        ended = np.concatenate([weights, np.tile(alone, (height, 1, 1))], axis=1)
        weights = np.concatenate([np.tile(alone, (per_tile, 1)), ended.reshape(-1, count)])
    return RowOrder(
        sources=sources, before=per_tile, line=width + 1, seen=grid.seen, weights=weights
    )


def _mix(
    tokens: npt.NDArray[np.int64], height: int, width: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Bilinear interpolation without antialiasing: four tokens of each new one, and their shares.

    Args:
        tokens: int64 [lines, columns].
        height: New lines.
        width: New columns.

    Returns:
        Both [height, width, 4].
    """
    (top, bottom, down), (left, right, across) = (
        _neighbours(size, new) for size, new in zip(tokens.shape, (height, width), strict=True)
    )
    corners = [tokens[np.ix_(line, column)] for line in (top, bottom) for column in (left, right)]
    columns = (1 - across, across)
    shares = [np.outer(line, column) for line in (1 - down, down) for column in columns]
    return np.stack(corners, axis=-1), np.stack(shares, axis=-1).astype(np.float32)


def _neighbours(size: int, new: int) -> tuple[_Places, _Places, npt.NDArray[np.float32]]:
    """Of every new place along one axis, the old ones before and after, and the second's share."""
    half = np.float32(0.5)  # in float32 throughout, as torch counts
    centres = (np.arange(new, dtype=np.float32) + half) * np.float32(size / new)
    places = np.maximum(centres - half, 0)
    before = places.astype(np.int64)
    return before, np.minimum(before + 1, size - 1), places - before.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Anyres:
    """The tiling.

    Attributes:
        side: Pixels along one side of a tile.
        resolutions: Heights and widths that a picture may be fitted into, whole tiles both.
        most_area: Tokens of a map in tiles: one that has much more is made smaller; `None` for all.
        cuts_several: Whether pictures are cut where a conversation has several; else each of them
            is padded to a square and seen as a whole.
        has_whole: Whether the whole picture comes with its tiles.
        rule: What chooses the resolution; `None` for the model's own way.
    """

    has_whole: ClassVar[bool] = True

    kind: Literal["anyres"] = "anyres"
    side: int
    resolutions: tuple[tuple[int, int], ...]
    most_area: int | None = None
    cuts_several: bool = True
    rule: GridRule | None = None

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
        pinpoints = [list(size) for size in self.resolutions]
        return {"image_grid_pinpoints": pinpoints, **rule_settings(self.rule)}

    def picture_settings(self, width: int, height: int) -> Mapping[str, Any]:
        """What it is told of one picture besides, to cut it as a rule says."""
        if self.rule is None:
            return {}
        return {"image_grid_pinpoints": [list(self.resolution(width, height))]}

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
            rows=best[0] // self.side,
            columns=best[1] // self.side,
            picture=(width, height),
            most_area=self.most_area,
        )

    def grids(self, sizes: Sequence[tuple[int, int]]) -> list[TileGrid]:
        """The tiles of all pictures of a conversation, by their widths and heights."""
        if len(sizes) > 1 and not self.cuts_several:
            return [MapGrid(rows=0, columns=0, picture=size) for size in sizes]
        return [self.grid(*size) for size in sizes]

    def resolution(self, width: int, height: int) -> tuple[int, int]:
        """Height and width that it is fitted into: most of its pixels, then least around them.

        A rule has another way to choose.
        """
        if self.rule is not None:
            grids = [(high // self.side, wide // self.side) for high, wide in self.resolutions]
            rows, columns = self.rule.choose(width, height, grids, self.side)
            return rows * self.side, columns * self.side

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
