"""Tiles of pictures in torch, each with the visual tokens that a checkpoint's tile budget gives it.

The twin of `runtime.picture_rows.PictureRows.look`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.models.images.tile_tokens import tile_tokens
from pocketvlm.models.images.tilings.tile_grid import TileGrid
from pocketvlm.reference_graph.forward import VisualTokens, encode_by_each

__all__ = ["TokensByCount", "choose_tokens", "encode_tiles", "encode_with_all"]

TokensByCount = dict[int, list[VisualTokens]]
"""What every vision graph returns for each tile, [1, k], by its number of tokens."""


def encode_tiles(
    checkpoint: Checkpoint, pixels: Tensor, grids: Sequence[TileGrid]
) -> list[list[VisualTokens]]:
    """Visual tokens of the tiles of some pictures, [1, k] a tile.

    Args:
        checkpoint: The model, with or without a tile budget.
        pixels: float32 [tiles, C, S, S]: the tiles of all pictures that are seen.
        grids: How the pictures are cut.
    """
    found = encode_with_all(checkpoint, pixels)
    pictures: list[list[VisualTokens]] = []
    first = 0
    for grid in grids:
        tiles = range(first, first + grid.tiles)
        pictures.append(choose_tokens(checkpoint, found, tiles, pixels, grid))
        first += grid.tiles
    return pictures


def encode_with_all(checkpoint: Checkpoint, pixels: Tensor) -> TokensByCount:
    """Every tile as every vision graph sees it; without a tile budget, as the first one does."""
    visions = (checkpoint,) if checkpoint.tile_budget is None else checkpoint.each_vision()
    return {
        seen.visual_tokens: tokens.by_tile(1)
        for seen, tokens in zip(visions, encode_by_each(visions, pixels), strict=True)
    }


def choose_tokens(
    checkpoint: Checkpoint,
    found: TokensByCount,
    tiles: Sequence[int],
    pixels: Tensor,
    grid: TileGrid,
) -> list[VisualTokens]:
    """The tokens of the tiles of one picture, as many of each as the budget gives it.

    Args:
        checkpoint: The model.
        found: What `encode_with_all` returns.
        tiles: Which of its tiles are this picture's.
        pixels: float32 [all tiles, C, S, S].
        grid: How the picture is cut.
    """
    budget = checkpoint.tile_budget
    if budget is None:
        return [found[checkpoint.visual_tokens][tile] for tile in tiles]
    whole = found[budget.whole][tiles[grid.seen.index(grid.whole)]]
    counts = tile_tokens(
        budget,
        grid,
        checkpoint.spec.visual_tokens,
        pixels=pixels[list(tiles)].cpu().numpy(),
        kept=whole.indices[0].cpu().numpy(),
    )
    return [found[count][tile] for count, tile in zip(counts, tiles, strict=True)]
