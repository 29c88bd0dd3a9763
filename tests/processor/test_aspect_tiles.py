"""Grids of the nearest ratio, their pixels and settings, are those of the stock processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from pocketvlm.checkpoint import read_model_folder
from pocketvlm.errors import CheckpointError
from pocketvlm.models.images.reading import parse_image_settings
from pocketvlm.models.images.tilings import ONE_TILE, AspectGrid, TileGrid
from pocketvlm.pipeline.stock import StockModel
from pocketvlm.processor import Processor, user_message
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.runtime.preprocess import ImagePreprocessor
from tests.processor.test_tiles import SIZES, picture

CONFIG: dict[str, Any] = {
    "image_processor_type": "GotOcr2ImageProcessorFast",
    "size": {"height": 32, "width": 32},
    "crop_to_patches": False,  # as published; the combined processor says otherwise
    "min_patches": 1,
    "max_patches": 12,
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def read(**changes: Any):
    return parse_image_settings({**CONFIG, **changes}, Path("p.json"), "internvl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aspect") / "model"
    write_tiny_model("internvl3", path)
    return path


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return Processor.load(folder, read_model_folder(folder).spec)


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    """The family's processor without its video part, which wants torchvision."""
    model = StockModel.load(read_model_folder(folder))
    assert type(model.processor).__name__ == "InternVLProcessor"
    assert model.notes[0].endswith("it is made without that")
    return model.processor


def conversation(texts: list[str], pictures: int) -> list[dict[str, Any]]:
    system = {"role": "system", "content": [{"type": "text", "text": "you see well"}]}
    first = user_message(texts[0], images=pictures)
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}
    return [system, first, answer, *(user_message(text) for text in texts[1:])]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_pixels_and_prompt_are_those_of_the_stock_processor(processor, stock, size):
    images = [picture(size), picture((50, 70)), picture(size[::-1])]
    messages = conversation(["what are they?", "and this?"], 2)
    text = stock.apply_chat_template(messages, add_generation_prompt=True)
    expected = stock(images=[images], text=[text], return_tensors="np", add_special_tokens=False)
    preprocessor = ImagePreprocessor.from_settings(processor.image_processor.settings)
    ours = np.concatenate([preprocessor.pixels(image) for image in images])
    np.testing.assert_array_equal(ours, expected["pixel_values"])
    np.testing.assert_array_equal(processor.pixels(images).numpy(), ours)
    grids = [preprocessor.grid(image) for image in images]
    assert sum(grid.tiles for grid in grids) == len(ours)
    assert processor.encode(messages, grids) == expected["input_ids"][0].tolist()


def test_a_tokenizer_may_spell_the_words_of_a_picture_otherwise(folder, tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    words = {"<img>": "<image-begin>", "</img>": "<image-end>", "<IMG_CONTEXT>": "<|visual|>"}
    for file in folder.iterdir():
        content = file.read_bytes()
        if file.suffix in (".json", ".jinja"):
            for word, other in words.items():
                content = content.replace(word.encode(), other.encode())
        (path / file.name).write_bytes(content)
    own = Processor.load(path, read_model_folder(path).spec)
    before = Processor.load(folder, read_model_folder(folder).spec)
    messages, grids = [user_message("what?")], [TileGrid(rows=1, columns=2)]
    assert own.encode(messages, grids) == before.encode(messages, grids)
    assert own.spec.image_prefix == "<image-begin>"


@settings(max_examples=400)
@given(
    side=st.integers(8, 600),
    fewest=st.integers(1, 6),
    more=st.integers(0, 12),
    width=st.integers(1, 6000),
    height=st.integers(1, 6000),
)
def test_grids_are_those_of_stock(side: int, fewest: int, more: int, width: int, height: int):
    tiling = AspectGrid(side=side, fewest=fewest, most=fewest + more)
    grid = tiling.grid(width, height)
    canvas = get_optimal_tiled_canvas((height, width), (side, side), fewest, fewest + more)
    assert (grid.columns, grid.rows) == canvas
    assert grid.tiles <= tiling.most_tiles
    assert tiling.resizes(width, height) == ((grid.columns * side, grid.rows * side),)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        # Ratio 1 is that of 1 x 1, 2 x 2 and 3 x 3 tiles: more than half of their pixels decides.
        ((44, 44), (1, 1)), ((45, 45), (1, 1)), ((46, 46), (2, 2)), ((67, 67), (2, 2)),
        ((68, 68), (3, 3)), ((64, 32), (1, 2)), ((65, 32), (1, 2)), ((46, 92), (4, 2)),
    ],
)  # fmt: skip
def test_of_grids_as_near_the_larger_wins_while_it_is_filled(size, grid):
    found = AspectGrid(side=32, fewest=1, most=12).grid(*size)
    assert (found.rows, found.columns) == grid


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_patches": 4},
        {"max_patches": 1},
        {"min_patches": 3, "max_patches": 7, "resample": 2},
        {"do_normalize": False, "size": 32, "default_to_square": True},
        {"min_patches": None, "max_patches": None, "image_mean": None, "image_std": None},
    ],
    ids=str,
)
def test_pixels_are_those_of_stock(changes):
    stated = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    stock = GotOcr2ImageProcessorPil(**stated)
    preprocessor = ImagePreprocessor.from_settings(
        parse_image_settings(stated, Path("p.json"), "internvl")
    )
    for size in SIZES:
        image = picture(size)
        expected = stock(images=[image], return_tensors="np", crop_to_patches=True)
        ours = preprocessor.pixels(image)
        np.testing.assert_array_equal(ours, expected["pixel_values"])
        assert preprocessor.grid(image).tiles == len(ours)


@pytest.mark.parametrize(
    ("tiles", "most"), [(1, 1), (2, 1), (3, 2), (4, 3), (12, 11), (13, 12), (40, 12)]
)
def test_fewer_tiles_are_a_smaller_grid_and_the_whole(tiles: int, most: int):
    tiling = AspectGrid(side=32, fewest=1, most=12)
    limited = tiling.limited(tiles)
    assert limited == AspectGrid(side=32, fewest=1, most=most)
    assert limited.most_tiles <= tiles
    assert read(**limited.settings).tiling == limited


def test_a_grid_that_must_not_be_small_is_limited_as_well():
    limited = AspectGrid(side=32, fewest=4, most=12).limited(3)
    assert limited == AspectGrid(side=32, fewest=2, most=2)
    assert AspectGrid(side=32, fewest=1, most=1).grid(500, 20) == ONE_TILE
    assert limited.grid(500, 20) == TileGrid(rows=1, columns=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_patches": 65}, "min_patches and max_patches are 1 and 65; allowed are 1 to 64"),
        ({"min_patches": 13}, "min_patches and max_patches are 13 and 12"),
        ({"min_patches": 0}, "min_patches and max_patches are 0 and 12"),
        ({"size": {"height": 32, "width": 48}}, "size must be a square"),
        ({"size": {"shortest_edge": 32}}, "do_center_crop must be true where size is"),
        ({"do_resize": False}, "do_resize must be true"),
        ({"do_center_crop": True, "crop_size": 32}, "do_center_crop must be false"),
        ({"size": {"height": 4096, "width": 4096}}, "12 tiles of 4096 x 4096 are more than"),
        ({"image_processor_type": "CLIPImageProcessor"}, "supported are GotOcr2ImageProcessor"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        parse_image_settings(
            {**CONFIG, **changes}, Path("p.json"), "internvl", error=CheckpointError
        )
