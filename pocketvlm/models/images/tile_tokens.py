"""Visual tokens of every tile of a picture, as a tile budget gives them by what tiles show."""

from __future__ import annotations

from math import isqrt

import numpy as np
import numpy.typing as npt

from pocketvlm.bundle import TileBudget, share_out
from pocketvlm.models.images.tilings.tile_grid import TileGrid

__all__ = ["tile_detail", "tile_tokens"]

_BLOCK = 8
_UNIT = 1000


def tile_tokens(
    budget: TileBudget,
    grid: TileGrid,
    per_tile: int,
    *,
    pixels: npt.NDArray[np.float32],
    kept: npt.NDArray[np.int64],
) -> list[int]:
    """Tokens of every tile that is seen, in their order.

    Args:
        budget: The budget.
        grid: How the picture is cut.
        per_tile: Tokens of a tile before reduction, a square map.
        pixels: float32 [tiles, C, S, S]: the tiles that are seen.
        kept: int64 [whole]: which of its tokens the whole picture kept.
    """
    parts = [number for number in grid.seen if number in grid.parts]
    if budget.by == "nothing" or not parts:
        given = [budget.tile] * len(parts)
    else:
        if budget.by == "detail":
            shown = {number: tile_detail(pixels[grid.seen.index(number)]) for number in parts}
        else:
            of_whole = grid.shown_by_whole(isqrt(per_tile))[:, kept].ravel().tolist()
            shown = {number: of_whole.count(number) for number in parts}
        given = share_out([shown[number] for number in parts], budget.levels, budget.tile)
    own = dict(zip(parts, given, strict=True))
    return [own.get(number, budget.whole) for number in grid.seen]


def tile_detail(pixels: npt.NDArray[np.float32]) -> int:
    """The mean step between the means of neighbouring blocks of 8 x 8 pixels, in thousandths.

    Means ignore grain. Whole numbers, so that sums that differ by a rounding mean the same.

    Args:
        pixels: float32 [C, height, width], as a tower takes them; what is left of an edge that is
            not whole blocks does not count.
    """
    channels, height, width = pixels.shape
    rows, columns = max(height // _BLOCK, 1), max(width // _BLOCK, 1)
    tall, wide = min(height, _BLOCK), min(width, _BLOCK)
    used = pixels[:, : rows * tall, : columns * wide].astype(np.float64)
    means = used.reshape(channels, rows, tall, columns, wide).mean(axis=(2, 4))
    steps = [np.abs(np.diff(means, axis=axis)) for axis in (1, 2)]
    count = max(sum(step.size for step in steps), 1)
    return round(_UNIT * float(sum(step.sum() for step in steps)) / count)
