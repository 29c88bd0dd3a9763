"""Cutting: the tiles of all pictures of a conversation, by their sizes and what they show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from PIL import Image

from pocketvlm.models.images.empty_tiles import EmptyTiles
from pocketvlm.models.images.tilings import ONE_TILE, TileGrid, Tiling, grids_of

__all__ = ["PictureCutter", "cut_pictures"]


class PictureCutter(Protocol):
    """What cuts pictures for one model: a bundle's preprocessor, a checkpoint's processor."""

    @property
    def tiling(self) -> Tiling | None:
        """How large pictures are cut; `None` where each is one tile."""

    @property
    def empty_tiles(self) -> EmptyTiles | None:
        """What leaves out tiles that show nothing; `None` where all are seen."""

    def without_empty(self, image: Image.Image, grid: TileGrid) -> TileGrid:
        """The tiles of a picture that are seen, of those that its size has."""


def cut_pictures(
    cutter: PictureCutter,
    sizes: Sequence[tuple[int, int]],
    open_image: Callable[[int], Image.Image],
) -> list[TileGrid]:
    """The tiles of all pictures of a conversation.

    Args:
        cutter: What cuts them.
        sizes: Widths and heights of upright pictures, in their order.
        open_image: Decodes one, by its number; not called where sizes say everything.
    """
    if cutter.tiling is None:
        return [ONE_TILE] * len(sizes)
    grids = grids_of(cutter.tiling, sizes)
    if cutter.empty_tiles is None:
        return grids
    return [cutter.without_empty(open_image(number), grid) for number, grid in enumerate(grids)]
