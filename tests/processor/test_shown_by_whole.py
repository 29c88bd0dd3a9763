"""Which tile shows what a token of the whole picture shows: asked of the pixels themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.reference.random_models import write_tiny_model

SIZES = ((96, 96), (200, 70), (70, 200), (130, 100))


def gradient(width: int, height: int) -> Image.Image:
    """Red says how far to the right a pixel is, green how far down; neither is black."""
    pixels = np.full((height, width, 3), 128.0)
    pixels[..., 0] = np.linspace(60, 250, width)
    pixels[..., 1] = np.linspace(60, 250, height)[:, None]
    return Image.fromarray(pixels.round().astype(np.uint8))


@pytest.mark.parametrize("name", ["smolvlm-tiles", "lfm2-vl-tiles", "internvl3", "llava-next"])
def test_the_tile_has_the_colour_of_the_token(name: str, tmp_path: Path):
    write_tiny_model(name, tmp_path)
    checkpoint = Checkpoint.load(tmp_path)
    side = round(checkpoint.spec.visual_tokens**0.5)
    cut = 0
    for size in SIZES:
        image = gradient(*size)
        (grid,) = checkpoint.processor.grids([image])
        if not grid.parts:
            continue
        cut += 1
        values = checkpoint.processor.pixels([image], [grid]).numpy()[:, :2]
        settings = checkpoint.processor.image_processor.settings
        shift, scale = (
            np.array(part[:2])[:, None, None] for part in (settings.image_mean, settings.image_std)
        )
        levels = (values * scale + shift) * 255
        tokens = levels[grid.whole].reshape(2, side, levels.shape[2] // side, side, -1)
        colours = tokens.mean(axis=(2, 4)).reshape(2, -1)
        assert grid.shown_by_whole(side).shape == (1, side * side)
        for token, part in enumerate(grid.shown_by_whole(side)[0]):
            tile = levels[part].reshape(2, -1)
            shown = tile[:, tile.min(axis=0) > 40]  # black is the border of a canvas
            assert (shown.min(axis=1) - 4 <= colours[:, token]).all(), (size, token)
            assert (colours[:, token] <= shown.max(axis=1) + 4).all(), (size, token)
    assert cut >= 2
