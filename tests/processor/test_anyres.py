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
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from pocketvlm.errors import CheckpointError
from pocketvlm.models.images.reading import parse_image_settings
from pocketvlm.models.images.settings import ImageSettings
from pocketvlm.models.images.tilings import grids_of
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
        np.testing.assert_array_equal(order.sources[:, 0], stock_rows(size, pinpoints, grid.tiles))
        every = np.tile(np.arange(per_tile), (grid.tiles, 1))
        kept = order.kept(every, per_tile)
        np.testing.assert_array_equal(kept.rows, order.sources)
        np.testing.assert_array_equal(kept.offsets, np.arange(count))
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
    order = RowOrder(sources=sources[:, None], before=2, line=3, seen=range(3))
    # Tile 0 kept its second token, tile 1 the token 3, tile 2 the token 4.
    kept = order.kept(np.array([[1], [1], [0]]), 2)
    assert kept.rows[:, 0].tolist() == [0, 2, LINE_BREAK, 1, LINE_BREAK]
    assert kept.offsets.tolist() == [1, 3, 4, 5, 7]
    kept = order.kept(np.array([[1], [0], [0]]), 2)
    assert kept.rows[:, 0].tolist() == [0, 1, 2, LINE_BREAK]
    assert kept.offsets.tolist() == [1, 2, 3, 4]


def test_a_mixed_row_stays_with_its_largest_share():
    sources = np.array([[0, 1], [2, 3], [LINE_BREAK, LINE_BREAK]])
    weights = np.array([[0.75, 0.25], [0.25, 0.75], [1.0, 0.0]], np.float32)
    order = RowOrder(sources=sources, before=0, line=3, seen=range(2), weights=weights)
    # Of two tiles of two tokens, the first kept its first and the second its first.
    kept = order.kept(np.array([[0], [0]]), 2)
    assert kept.offsets.tolist() == [0, 2]
    assert kept.weights is not None
    assert kept.weights.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert kept.rows.tolist() == [[0, LINE_BREAK], [LINE_BREAK, LINE_BREAK]]
    assert order.kept(np.array([[1], [1]]), 2).offsets.tolist() == [1, 2]
    whole = order.kept(np.array([[0, 1], [0, 1]]), 2)
    assert whole.weights is not None
    assert whole.weights.tolist() == weights.tolist()


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


def onevision(tiles):
    document = config(tiles, image_processor_type="LlavaOnevisionImageProcessor")
    return document | {"size": {"height": SIDE, "width": SIDE}, "crop_size": None}


def test_maps_that_are_too_large_are_made_smaller_as_stock_makes_them():
    side = SIDE // PATCH
    tiling = read(onevision(WIDE)).tiling
    assert isinstance(tiling, Anyres)
    vision = SimpleNamespace(image_size=SIDE, patch_size=PATCH)
    pinpoints = [list(size) for size in tiling.resolutions]
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints)
    )
    newline = torch.full((3,), 7.0)
    mixed = 0
    for size in MANY:
        grid = tiling.grid(*size)
        order = grid.order(side * side)
        generator = torch.Generator().manual_seed(sum(size))
        features = torch.randn(grid.tiles, side * side, 3, generator=generator)
        (expected,), _ = LlavaOnevisionModel.pack_image_features(
            model, [features], [(size[1], size[0])], newline
        )
        assert grid.placeholders(side * side) == len(expected), size
        table = np.concatenate([features.flatten(0, 1).numpy(), newline[None].numpy()])
        kept = order.kept(np.tile(np.arange(side * side), (grid.tiles, 1)), side * side)
        np.testing.assert_array_equal(kept.offsets, np.arange(len(expected)))
        found = table[kept.rows]
        if kept.weights is not None:
            mixed += 1
            found = found * kept.weights[..., None]
        np.testing.assert_allclose(found.sum(axis=1), expected.numpy(), rtol=0, atol=5e-6)
    assert mixed > 10
    few = tiling.limited(10)
    assert all(few.grid(*size).order(side * side).weights is None for size in MANY)


def test_several_pictures_are_seen_whole_as_stock_sees_them():
    document = onevision(WIDE)
    stock = LlavaOnevisionImageProcessorPil(**document)
    preprocessor = ImagePreprocessor.from_settings(read(document))
    pictures = [picture(size) for size in MANY]
    grids = preprocessor.grids(pictures)
    expected = stock(images=[pictures], return_tensors="np")["pixel_values"]
    for image, grid, pixels in zip(pictures, grids, expected, strict=True):
        np.testing.assert_array_equal(preprocessor.pixels(image, grid), pixels)
        assert grid.tiles == 1
        assert grid.placeholders(16) == grid.most_rows(16, 16) == 17
        assert grid.order(16).sources.ravel().tolist() == [*range(16), LINE_BREAK]
        alone = stock(images=[[image]], return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(preprocessor.pixels(image), alone)
    # LLaVA-NeXT cuts them all.
    tiling = read(config(PUBLISHED)).tiling
    assert grids_of(tiling, MANY) == [tiling.grid(*size) for size in MANY]
