"""Tiles and their prompts are those of the stock processor, for every size of picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from pocketvlm.errors import CheckpointError
from pocketvlm.models.images.reading import parse_image_settings
from pocketvlm.models.images.tilings import ONE_TILE, SplitGrid, TileGrid
from pocketvlm.models.spec import ModelSpec
from pocketvlm.processor import Processor, user_message
from pocketvlm.prompt.picture_text import PictureText
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.runtime.preprocess import ImagePreprocessor

SIZES = [
    (1, 1), (1, 2), (2, 1), (7, 3), (64, 64), (63, 64), (65, 64), (64, 65), (128, 64), (64, 128),
    (192, 192), (193, 192), (191, 192), (192, 191), (192, 64), (64, 192), (192, 65), (65, 192),
    (640, 480), (480, 640), (1000, 500), (500, 1000), (1, 200), (200, 1), (3, 600), (600, 3),
    (100, 100), (101, 100), (100, 101), (333, 222), (222, 333), (1920, 1080), (1080, 1920),
    (1024, 768), (768, 1024), (300, 299), (299, 300), (50, 150), (150, 50), (49, 150), (51, 150),
    (97, 96), (96, 97), (95, 96), (32, 96), (96, 32), (31, 96), (33, 96), (2000, 31), (31, 2000),
    (4097, 10), (10, 4097), (12, 12), (5, 4), (4, 5),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiles") / "model"
    write_tiny_model("smolvlm-tiles", path)
    return path


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    from pocketvlm.checkpoint.config import read_config, read_spec

    return Processor.load(folder, read_spec(read_config(folder)))


@pytest.fixture(scope="module")
def stock(processor: Processor):
    from transformers import Idefics3Processor

    return Idefics3Processor(
        image_processor=processor.image_processor.stock,
        tokenizer=processor.tokenizer,
        image_seq_len=processor.spec.visual_tokens,
        chat_template=processor.chat_template,
    )


def picture(size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_pixels_and_prompt_are_those_of_the_stock_processor(processor, stock, size):
    image = picture(size)
    messages = [user_message("what is it?")]
    text = stock.apply_chat_template(messages, add_generation_prompt=True)
    expected = stock(images=[[image]], text=[text], return_tensors="np", add_special_tokens=False)
    preprocessor = ImagePreprocessor.from_settings(processor.image_processor.settings)
    ours = preprocessor.pixels(image)
    np.testing.assert_array_equal(ours, expected["pixel_values"][0])
    np.testing.assert_array_equal(processor.pixels([image]).numpy(), ours)
    grid = preprocessor.grid(image)
    assert grid.tiles == len(ours)
    assert processor.encode(messages, [grid]) == expected["input_ids"][0].tolist()


def test_pictures_of_several_sizes_stand_in_their_order(processor, stock):
    images = [picture(size) for size in ((640, 480), (10, 10), (100, 300))]
    messages = [user_message("which?", images=3)]
    grids = [processor.image_processor.settings.grid(*image.size) for image in images]
    text = stock.apply_chat_template(messages, add_generation_prompt=True)
    expected = stock(images=[images], text=[text], return_tensors="np", add_special_tokens=False)
    assert processor.encode(messages, grids) == expected["input_ids"][0].tolist()
    np.testing.assert_array_equal(processor.pixels(images).numpy(), expected["pixel_values"][0])
    assert processor.tiles(images) == [grid.tiles for grid in grids]
    with pytest.raises(ValueError, match="2 grids of tiles are given for 3 pictures"):
        processor.encode(messages, grids[:2])


@pytest.mark.parametrize(
    "size", [{"longest_edge": 150}, {"longest_edge": 65}, {"height": 100, "width": 170}], ids=str
)
def test_a_first_size_that_is_not_whole_tiles_is_cut_as_stock_cuts_it(size):
    config = {"do_image_splitting": True, "size": size, "max_image_size": {"longest_edge": 64}}
    stock = Idefics3ImageProcessorPil(**config, resample=1)
    config |= {"image_processor_type": "Idefics3ImageProcessor", "resample": 1}
    found = parse_image_settings(config, Path("p.json"), "idefics3")
    preprocessor = ImagePreprocessor.from_settings(found)
    for shape in SIZES:
        image = picture(shape)
        expected = stock(images=[[image]], return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(preprocessor.pixels(image), expected)
        assert preprocessor.grid(image).tiles == len(expected)


def test_a_photo_becomes_the_published_number_of_tiles():
    published = SplitGrid(side=512, first=2048)
    assert published.grid(640, 480) == TileGrid(rows=3, columns=4)
    assert published.grid(640, 480).tiles == 13
    assert published.most_tiles == 17


@settings(max_examples=300)
@given(
    side=st.integers(8, 600),
    edges=st.integers(1, 8),
    width=st.integers(1, 6000),
    height=st.integers(1, 6000),
)
def test_every_grid_holds_its_bounds(side: int, edges: int, width: int, height: int):
    tiling = SplitGrid(side=side, first=side * edges)
    grid = tiling.grid(width, height)
    assert 1 <= grid.tiles <= tiling.most_tiles
    tiled = tiling.tiled_size(width, height)
    assert tiled == (grid.columns * side, grid.rows * side)
    assert (grid == ONE_TILE) == (tiled == (side, side))


def test_markers_of_a_stranger_are_replaced_and_never_formatted():
    text = PictureText(placeholder="<i>", count=1, tile_marker="{row.__class__}{row}{column}{0}")
    written = text.write(TileGrid(rows=1, columns=2))
    assert written == "{row.__class__}11{0}<i>{row.__class__}12{0}<i>\n\n<i>"


def test_tiles_without_markers_are_one_run():
    text = PictureText(placeholder="<i>", count=2, prefix="<p>", suffix="</p>")
    assert text.write(TileGrid(rows=2, columns=1)) == f"<p>{'<i>' * 6}</p>"


def test_tiles_may_stand_with_the_whole_inside_the_pictures_frame():
    text = PictureText(
        placeholder="<i>",
        count=2,
        prefix="<start>",
        suffix="<end>",
        tile_marker="<{row},{column}>",
        whole_marker="<whole>",
    )
    assert text.write() == "<start><i><i><end>"
    written = text.write(TileGrid(rows=2, columns=1))
    assert written == "<start><1,1><i><i><2,1><i><i><whole><i><i><end>"
    assert text.writes("<whole>")
    assert not text.writes("\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, "do_resize must be true where do_image_splitting is"),
        ({"size": {"longest_edge": 9 * 64}}, "up to 82 tiles; allowed are 65"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(change, message):
    config = {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 192},
        "max_image_size": {"longest_edge": 64},
        **change,
    }
    with pytest.raises(CheckpointError, match=message):
        parse_image_settings(config, Path("p.json"), "idefics3", error=CheckpointError)


def test_the_specification_keeps_the_marker_as_the_tokenizer_spells_it(processor):
    spec: ModelSpec = processor.spec
    assert spec.tile_marker == f"{spec.image_suffix}<row_{{row}}_col_{{column}}>"
