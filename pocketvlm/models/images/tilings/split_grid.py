"""Idefics3's tiling: tiles in full resolution, then the whole picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pocketvlm.models.images.tilings.grid_rules import GridRule, rule_settings
from pocketvlm.models.images.tilings.tile_grid import TileGrid

__all__ = ["SplitGrid", "longest_edge_size"]

_LONGEST_EDGE_LIMIT = 4096
_MOST_EDGES = 8


@dataclass(frozen=True, kw_only=True)
class SplitGrid:
    """Idefics3's tiling (arXiv 2408.12637, section 3): tiles in full resolution, then the whole.

    Attributes:
        side: Pixels along one side of a tile.
        first: What a picture is resized to before it is cut: height and width, or the length of
            its longest edge, which keeps the ratio.
        shrinks_tiled: Whether the whole picture is made of what was cut, not of the original.
        has_whole: Whether the whole picture comes with its tiles.
        rule: What chooses the grid in place of the longest edge, of those that this one allows;
            a picture is then resized to whole tiles at once. `None` for the model's own way.
    """

    shrinks_tiled: ClassVar[bool] = True
    has_whole: ClassVar[bool] = True

    kind: Literal["split_grid"] = "split_grid"
    side: int
    first: tuple[int, int] | int
    rule: GridRule | None = None

    @property
    def most_tiles(self) -> int:
        """Tiles of the picture that costs most."""
        if isinstance(self.first, tuple):
            return self.grid(1, 1).tiles
        return TileGrid(rows=self.most_edge, columns=self.most_edge).tiles

    @property
    def most_edge(self) -> int:
        """Tiles along the longest edge that a picture can have."""
        if isinstance(self.first, tuple):
            return max(self.grid(1, 1).rows, self.grid(1, 1).columns)
        # The shorter edge of a nearly square picture, made even, may exceed an odd longest one.
        longest = min(self.first + self.first % 2, _LONGEST_EDGE_LIMIT)
        return math.ceil(longest / self.side)

    def first_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture is resized to first."""
        if self.rule is not None:
            edges = range(1, self.most_edge + 1)
            grids = [(rows, columns) for rows in edges for columns in edges]
            rows, columns = self.rule.choose(width, height, grids, self.side)
            return columns * self.side, rows * self.side
        if isinstance(self.first, int):
            return longest_edge_size(width, height, self.first)
        return self.first[1], self.first[0]

    def tiled_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height, whole tiles both, that it is resized to afterwards."""
        width, height = self.first_size(width, height)
        ratio = width / height
        if width >= height:
            width = self._whole(width)
            height = self._whole(int(width / ratio))
        else:
            height = self._whole(height)
            width = self._whole(int(height * ratio))
        return width, height

    def grid(self, width: int, height: int) -> TileGrid:
        """The tiles of a picture of this size."""
        width, height = self.tiled_size(width, height)
        return TileGrid(rows=height // self.side, columns=width // self.side)

    def resizes(self, width: int, height: int) -> tuple[tuple[int, int], ...]:
        """Widths and heights that a picture is resized to, one after the other, to be cut."""
        return self.first_size(width, height), self.tiled_size(width, height)

    def limited(self, max_tiles: int) -> SplitGrid:
        """The same with no more tiles: a shorter longest edge, in whole tiles."""
        if self.most_tiles <= max_tiles:
            return self
        squares = (replace(self, first=edges * self.side) for edges in range(_MOST_EDGES, 0, -1))
        return next(tiling for tiling in squares if tiling.most_tiles <= max_tiles)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the library's image processor is told, to cut pictures in this way."""
        return {**_size(self.first), **rule_settings(self.rule)}

    def picture_settings(self, width: int, height: int) -> Mapping[str, Any]:
        """What it is told of one picture besides, to cut it as a rule says."""
        if self.rule is None:
            return {}
        width, height = self.first_size(width, height)
        return _size((height, width))

    def _whole(self, length: int) -> int:
        # The library cannot resize to nothing either: an edge is one tile at least.
        return max(1, math.ceil(length / self.side)) * self.side


def _size(first: tuple[int, int] | int) -> Mapping[str, Any]:
    if isinstance(first, int):
        return {"size": {"longest_edge": first}}
    return {"size": {"height": first[0], "width": first[1]}}


def longest_edge_size(width: int, height: int, length: int) -> tuple[int, int]:
    """Width and height with the longest edge at `length`; the shorter is even, and at least 1."""
    ratio = width / height
    if width >= height:
        width, height = length, int(length / ratio)
        height += height % 2
    else:
        width, height = int(length * ratio), length
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    limit = _LONGEST_EDGE_LIMIT
    ratio = width / height
    if width >= height and width > limit:
        width, height = limit, int(limit / ratio)
    elif height > width and height > limit:
        width, height = int(limit * ratio), limit
    return max(width, 1), max(height, 1)
