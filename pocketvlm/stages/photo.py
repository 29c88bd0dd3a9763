"""The photo that plans speak of: its tiles, and the tokens of it that enter the decoder."""

from __future__ import annotations

from pocketvlm.models.images.tilings.tile_grid import ONE_TILE, TileGrid
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages.plan_state import PlanState

__all__ = ["PHOTO", "photo_grid", "photo_tokens"]

PHOTO = (640, 480)
"""Its width and height."""


def photo_grid(spec: ModelSpec) -> TileGrid:
    """Tiles of the photo."""
    return ONE_TILE if spec.tiling is None else spec.tiling.grid(*PHOTO)


def photo_tokens(state: PlanState) -> int:
    """Visual tokens of the photo that enter the decoder."""
    return state.most_rows(photo_grid(state.spec))
