"""From tiles of pictures to the rows that stand for them: the twin of `runtime.picture_rows`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.models.images.tilings.tile_grid import TileGrid

__all__ = ["PictureRows", "arrange_tiles"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PictureRows:
    """The rows that stand for one run of placeholders: a picture, or one tile of it.

    Attributes:
        embeds: float32 [batch, k, width].
        indices: int64 [batch, k]: which of the N unreduced tokens these are, ascending.
        placeholders: Length of the run, N.
    """

    embeds: Tensor
    indices: Tensor
    placeholders: int


def arrange_tiles(
    checkpoint: Checkpoint,
    tiles: Sequence[tuple[Tensor, Tensor]],
    grids: Sequence[TileGrid] | None,
) -> list[PictureRows]:
    """The rows of a prompt's pictures, one entry per tile, or per picture where tiles make a map.

    Args:
        checkpoint: The model.
        tiles: What vision graphs returned for each tile of a prompt: embeds, float32
            [batch, k, width], and which of its tokens it kept, int64 [batch, k].
        grids: How the pictures are cut, the same in every prompt; may be `None` where tile follows
            tile.

    Raises:
        ValueError: Grids are missing or do not have these tiles, or prompts of one batch kept rows
            of different numbers.
    """
    spec = checkpoint.spec
    per_tile = spec.visual_tokens
    if spec.line_break is None:
        seen = [
            PictureRows(embeds=embeds, indices=indices, placeholders=per_tile)
            for embeds, indices in tiles
        ]
        return seen if grids is None else _with_left_out(seen, grids)
    if grids is None or sum(grid.tiles for grid in grids) != len(tiles):
        raise ValueError(f"{len(tiles)} tiles make up maps, and their grids are not given")
    batch = len(tiles[0][0])
    last = checkpoint.model.get_parameter(spec.line_break).expand(batch, 1, -1)
    pictures: list[PictureRows] = []
    first = 0
    for grid in grids:
        own = tiles[first : first + grid.tiles]
        first += grid.tiles
        order = grid.order(per_tile)
        if order is None:
            raise ValueError("a picture of this model has no order of rows")
        kept = [
            order.kept([indices[prompt].cpu().numpy() for _, indices in own], per_tile)
            for prompt in range(batch)
        ]
        if len({len(each.offsets) for each in kept}) > 1:
            raise ValueError("prompts of one batch kept rows of different numbers")
        table = torch.cat([*(embeds for embeds, _ in own), last], dim=1)
        width = table.shape[-1]
        rows = torch.stack([torch.from_numpy(each.rows) for each in kept]) % table.shape[1]
        rows = rows.to(table.device)
        places = rows.flatten(1)[..., None].expand(-1, -1, width)
        mixed = table.gather(1, places).view(*rows.shape, width)
        weights = [torch.from_numpy(each.weights) for each in kept if each.weights is not None]
        if weights:
            mixed = mixed * torch.stack(weights).to(table.device)[..., None]
        pictures.append(
            PictureRows(
                embeds=mixed.sum(dim=2),
                indices=torch.stack([torch.from_numpy(each.offsets) for each in kept]),
                placeholders=len(order.sources),
            )
        )
    return pictures


def _with_left_out(tiles: Sequence[PictureRows], grids: Sequence[TileGrid]) -> list[PictureRows]:
    """Tiles that are left out among those that are seen: runs that no row stands for."""
    first = tiles[0]
    nothing = replace(first, embeds=first.embeds[:, :0], indices=first.indices[:, :0])
    seen = iter(tiles)
    return [
        nothing if number in grid.left_out else next(seen)
        for grid in grids
        for number in range(grid.all_tiles)
    ]
