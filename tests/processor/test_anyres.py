"""Any resolution: tiles, placeholders and the order of rows are stock's, for every size."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from pocketvlm.errors import CheckpointError
from pocketvlm.models.images.settings import ImageSettings, parse_image_settings
from pocketvlm.models.images.tilings.anyres import Anyres
from pocketvlm.models.images.tilings.row_order import LINE_BREAK, RowOrder
from pocketvlm.runtime.preprocess import ImagePreprocessor
from tests.processor.test_tiles import SIZES, picture

SIDE, PATCH = 28, 7
PUBLISHED = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""LLaVA-NeXT's own, in tiles."""
WIDE = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7))
"""LLaVA-OneVision's."""
MANY = [*SIZES, (84, 28), (85, 28), (28, 84), (56, 56), (57, 55), (4000, 20), (20, 4000)]


def config(tiles, **changes):
    return {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_grid_pinpoints": [[rows * SIDE, columns * SIDE] for rows, columns in tiles],
        **changes,
    }


def read(document, **options) -> ImageSettings:
    return parse_image_settings(document, Path("p.json"), "llava_next", **options)


def stock_rows(size, pinpoints, tiles):
    """Stock's order of numbered features: -1 is the learned row."""
    side = SIDE // PATCH
    numbered = torch.arange(tiles * side * side, dtype=torch.float64).view(tiles, side * side, 1)
    vision = SimpleNamespace(image_size=SIDE, patch_size=PATCH)
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints)
    )
    (rows,), _ = LlavaNextModel.pack_image_features(
        model, [numbered], [(size[1], size[0])], "default", torch.tensor([-1.0]).double()
    )
    return rows.flatten().long().numpy()


@pytest.mark.parametrize("tiles", [PUBLISHED, WIDE], ids=["published", "wide"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}],
    ids=["shortest", "square"],
)
def test_pixels_and_rows_are_stocks_for_every_size(tiles, changes):
    document = config(tiles, **changes)
    stock = LlavaNextImageProcessorPil(**document)
    found = read(document)
    preprocessor = ImagePreprocessor.from_settings(found)
    stub = SimpleNamespace(image_processor=stock, patch_size=PATCH, num_additional_image_tokens=1)
    stub._get_unpadded_features = LlavaNextProcessor._get_unpadded_features.__get__(stub)
    for size in MANY:
        image = picture(size)
        expected = stock(images=[image], return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(preprocessor.pixels(image), expected)
        grid = preprocessor.grid(image)
        assert grid.tiles == len(expected)
        per_tile = (SIDE // PATCH) ** 2
        count = LlavaNextProcessor._get_number_of_features(stub, size[1], size[0], SIDE, SIDE) - 1
        assert grid.placeholders(per_tile) == count
        order = grid.order(per_tile)
        assert order is not None
        pinpoints = document["image_grid_pinpoints"]
        np.testing.assert_array_equal(order.sources, stock_rows(size, pinpoints, grid.tiles))
        every = np.tile(np.arange(per_tile), (grid.tiles, 1))
        rows, offsets = order.kept(every, per_tile)
        np.testing.assert_array_equal(rows, order.sources)
        np.testing.assert_array_equal(offsets, np.arange(count))
        assert grid.most_rows(per_tile, per_tile) == count


@settings(max_examples=300)
@given(
    tiles=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=9),
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
)
def test_the_resolution_is_the_one_that_stock_selects(tiles, width, height):
    resolutions = tuple((rows * 336, columns * 336) for rows, columns in tiles)
    tiling = Anyres(side=336, resolutions=resolutions)
    assert tiling.resolution(width, height) == select_best_resolution((height, width), resolutions)
    assert tiling.grid(width, height).tiles <= tiling.most_tiles


def test_a_break_stays_with_any_row_of_its_line():
    sources = np.array([0, 1, 2, 4, LINE_BREAK, 3, 5, LINE_BREAK])
    order = RowOrder(sources=sources, before=2, line=3)
    # Tile 0 kept its second token, tile 1 the token 3, tile 2 the token 4.
    rows, offsets = order.kept(np.array([[1], [1], [0]]), 2)
    assert rows.tolist() == [0, 2, LINE_BREAK, 1, LINE_BREAK]
    assert offsets.tolist() == [1, 3, 4, 5, 7]
    rows, offsets = order.kept(np.array([[1], [0], [0]]), 2)
    assert rows.tolist() == [0, 1, 2, LINE_BREAK]
    assert offsets.tolist() == [1, 2, 3, 4]


def test_fewer_tiles_are_the_resolutions_that_have_no_more():
    tiling = read(config(PUBLISHED)).tiling
    assert tiling is not None
    assert tiling.most_tiles == 5
    limited = tiling.limited(3)
    assert limited.settings == {"image_grid_pinpoints": [[28, 56], [56, 28]]}
    assert limited.most_tiles == 3
    with pytest.raises(ValueError, match="every picture of this model is cut into 3 or more"):
        tiling.limited(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"shortest_edge": 30}}, "size and crop_size a square of 28"),
        ({"size": {"longest_edge": 28}}, "size names longest_edge; allowed: shortest_edge"),
        ({"do_resize": False}, "do_resize must be true"),
        ({"image_grid_pinpoints": []}, "must be heights and widths in multiples of 28"),
        ({"image_grid_pinpoints": [[28, 57]]}, "must be heights and widths in multiples of 28"),
        ({"image_grid_pinpoints": [[28 * 9, 28 * 9]]}, "up to 82 tiles; allowed are 65"),
        ({"image_grid_pinpoints": [[28]]}, "must have 2 items"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        read(config(PUBLISHED, **change), error=CheckpointError)
