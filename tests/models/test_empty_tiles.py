"""Empty tiles: contrast as a loop computes it, and what of the mosaics is left out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.models.images.empty_tiles import EmptyTiles, tile_contrast
from pocketvlm.models.images.tilings import ONE_TILE, TileGrid
from pocketvlm.models.images.tilings.anyres import MapGrid
from pocketvlm.reference.mosaics import render_mosaic, sample_mosaic_example
from pocketvlm.reference.scenes import CANVAS

CONTRAST = EmptyTiles(contrast=12)


def looped_contrast(tile: np.ndarray) -> float:
    """The definition, block by block in float64."""
    height, width, channels = tile.shape
    tops = [min(top, height - 8) for top in range(0, height, 8)]
    lefts = [min(left, width - 8) for left in range(0, width, 8)]
    most = 0.0
    for channel in range(channels):
        means = [
            [tile[top : top + 8, left : left + 8, channel].astype(float).mean() for left in lefts]
            for top in tops
        ]
        for row in range(len(tops)):
            for column in range(len(lefts)):
                for other in ((row + 1, column), (row, column + 1)):
                    if other[0] < len(tops) and other[1] < len(lefts):
                        step = abs(means[row][column] - means[other[0]][other[1]])
                        most = max(most, step)
    return most


@settings(max_examples=60, deadline=None)
@given(height=st.integers(8, 41), width=st.integers(8, 41), seed=st.integers(0, 99))
def test_contrast_is_that_of_a_loop(height: int, width: int, seed: int):
    rng = np.random.default_rng(seed)
    tile = rng.integers(0, 256, (height, width, 3), np.uint8)
    assert tile_contrast(tile) == pytest.approx(looped_contrast(tile), abs=1e-9)
    assert tile_contrast(tile.swapaxes(0, 1)) == tile_contrast(tile)
    assert tile_contrast(tile // 2 + 100) == tile_contrast(tile // 2)


def test_grain_and_shade_are_no_contrast_and_a_thin_stroke_is():
    rng = np.random.default_rng(0)
    grain = np.clip(rng.normal(128, 9, (512, 512, 1)), 0, 255).astype(np.uint8).repeat(3, axis=2)
    assert tile_contrast(grain) < 12
    shade = np.linspace(0, 255, 512).astype(np.uint8)[:, None, None].repeat(512, axis=1)
    assert tile_contrast(shade.repeat(3, axis=2)) < 12
    stroke = np.full((512, 512, 3), 250, np.uint8)
    stroke[300:316, 200] = (30, 30, 30)  # sixteen pixels, one wide
    assert tile_contrast(stroke) > 12


def test_one_channel_is_enough():
    tile = np.full((16, 16, 3), 128, np.uint8)
    tile[:8, :, 2] = 90
    assert tile_contrast(tile) == 38


def tiles_of(grid: TileGrid, full: set[int]) -> np.ndarray:
    tiles = np.full((grid.all_tiles, 16, 16, 3), 200, np.uint8)
    for number in full:
        tiles[number, :8] = 0
    return tiles


def test_the_whole_picture_is_always_seen():
    grid = TileGrid(rows=2, columns=2)
    blank = CONTRAST.leave_out(grid, tiles_of(grid, set()))
    assert (blank.left_out, blank.seen, blank.tiles) == ((0, 1, 2, 3), [4], 1)
    some = CONTRAST.leave_out(grid, tiles_of(grid, {1, 3}))
    assert (some.left_out, some.seen, some.placeholders(64)) == ((0, 2), [1, 3, 4], 320)
    assert some.most_rows(64, 16) == 48
    assert some.complete == grid
    assert CONTRAST.leave_out(some, tiles_of(grid, set(range(5)))) == grid
    first = MapGrid(rows=1, columns=2, picture=(64, 32))
    assert CONTRAST.leave_out(first, tiles_of(first, {2})).seen == [0, 2]


@pytest.mark.parametrize("grid", [ONE_TILE, TileGrid(rows=1, columns=2, has_whole=False)])
def test_what_no_whole_picture_shows_is_seen(grid: TileGrid):
    assert CONTRAST.leave_out(grid, tiles_of(grid, set())) == grid


def test_of_mosaics_exactly_the_empty_scenes_are_left_out():
    """Objects and words of every size and colour, on plain, shaded and grainy backgrounds."""
    left_out = seen = 0
    for number in range(150):
        mosaic, _ = sample_mosaic_example(7, number, split="evaluation")
        pixels = np.asarray(render_mosaic(mosaic))
        for index, scene in enumerate(mosaic.scenes):
            row, column = divmod(index, mosaic.columns)
            tile = pixels[row * CANVAS :, column * CANVAS :][:CANVAS, :CANVAS]
            is_empty = tile_contrast(tile) < CONTRAST.contrast
            assert is_empty == (not scene.objects and scene.word is None), (number, index)
            left_out += is_empty
            seen += not is_empty
    assert min(left_out, seen) > 100
