"""Tilings: into how many pictures of the tower's size one picture is cut, by its size alone.

Sizes are computed as the library's image processors compute them, roundings included, so that
prompts and pixels agree with them for every size.
"""

from __future__ import annotations

from collections.abc import Sequence

from pocketvlm.models.images.tilings.anyres import Anyres
from pocketvlm.models.images.tilings.aspect_grid import AspectGrid, SecondGrid, TwoGrids
from pocketvlm.models.images.tilings.large_grid import LargeGrid
from pocketvlm.models.images.tilings.split_grid import SplitGrid
from pocketvlm.models.images.tilings.tile_grid import ONE_TILE, TileGrid

__all__ = [
    "ONE_TILE",
    "Anyres",
    "AspectGrid",
    "LargeGrid",
    "SecondGrid",
    "SplitGrid",
    "TileGrid",
    "Tiling",
    "TwoGrids",
    "grids_of",
]

Tiling = SplitGrid | AspectGrid | LargeGrid | Anyres
"""The ways in which processors cut pictures."""


def grids_of(tiling: Tiling | None, sizes: Sequence[tuple[int, int]]) -> list[TileGrid]:
    """The tiles of all pictures of a conversation.

    Args:
        tiling: The model's; `None` where each picture is one tile.
        sizes: Widths and heights of upright pictures, in their order.
    """
    if tiling is None:
        return [ONE_TILE] * len(sizes)
    if isinstance(tiling, Anyres):
        return tiling.grids(sizes)
    return [tiling.grid(*size) for size in sizes]
