"""Tilings: into how many pictures of the tower's size one picture is cut, by its size alone.

Sizes are computed as the library's image processors compute them, roundings included, so that
prompts and pixels agree with them for every size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["ONE_TILE", "SplitGrid", "TileGrid", "longest_edge_size"]

_LONGEST_EDGE_LIMIT = 4096


@dataclass(frozen=True, kw_only=True)
class TileGrid:
    """How one picture is cut.

    Attributes:
        rows: Tiles from top to bottom.
        columns: Tiles from left to right.
    """

    rows: int = 1
    columns: int = 1

    @property
    def is_split(self) -> bool:
        """Whether there are several tiles; then the whole picture follows them as one more."""
        return self.rows * self.columns > 1

    @property
    def tiles(self) -> int:
        """Pictures that the tower sees."""
        return self.rows * self.columns + int(self.is_split)


ONE_TILE = TileGrid()
"""A picture that is not cut."""


@dataclass(frozen=True, kw_only=True)
class SplitGrid:
    """Idefics3's tiling (arXiv 2408.12637, section 3): tiles in full resolution, then the whole.

    Attributes:
        side: Pixels along one side of a tile.
        first: What a picture is resized to before it is cut: height and width, or the length of
            its longest edge, which keeps the ratio.
    """

    side: int
    first: tuple[int, int] | int

    @property
    def most_tiles(self) -> int:
        """Tiles of the picture that costs most."""
        if isinstance(self.first, tuple):
            return self.grid(1, 1).tiles
        # The shorter edge of a nearly square picture, made even, may exceed an odd longest one.
        longest = min(self.first + self.first % 2, _LONGEST_EDGE_LIMIT)
        longest = math.ceil(longest / self.side)
        return TileGrid(rows=longest, columns=longest).tiles

    def first_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture is resized to first."""
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

    def _whole(self, length: int) -> int:
        # The library cannot resize to nothing either: an edge is one tile at least.
        return max(1, math.ceil(length / self.side)) * self.side


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
