"""LFM2-VL's pictures: tiles, pixels and prompts are those of the stock classes, for every size.

Stock has a class over torchvision alone. Its own code runs here with two things in place of others:
Pillow's resize, and one size for pictures that are not tiles.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pocketvlm.checkpoint import read_model_folder
from pocketvlm.errors import CheckpointError
from pocketvlm.models.images.reading import parse_image_settings
from pocketvlm.models.images.tilings import ONE_TILE, LargeGrid, TileGrid
from pocketvlm.pipeline.stock import StockModel
from pocketvlm.processor import Processor, user_message
from pocketvlm.processor.image_processor import as_tiles
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.runtime.preprocess import ImagePreprocessor
from tests.processor.test_tiles import SIZES, picture

MORE_SIZES = [
    *SIZES, (88, 88), (96, 85), (85, 96), (104, 72), (72, 104), (128, 160), (160, 128), (250, 100),
]  # fmt: skip
"""Those that lie about the border between one picture and tiles among them."""
_SETTINGS = {
    "min_tiles": 2,
    "max_tiles": 6,
    "min_image_tokens": 4,
    "max_image_tokens": 16,
    "encoder_patch_size": 8,
    "downsample_factor": 2,
    "tile_size": 64,
    "max_pixels_tolerance": 2.0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiles") / "model"
    write_tiny_model("lfm2-vl-tiles", path)
    return path


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return Processor.load(folder, read_model_folder(folder).spec)


@pytest.fixture(scope="module")
def combined(folder: Path) -> Any:
    return StockModel.load(read_model_folder(folder)).processor


def resize(_: Any, images: torch.Tensor, size: Any, **options: Any) -> torch.Tensor:
    """Pillow's resize of [pictures, channels, height, width]."""
    assert options["resample"] == Image.Resampling.BILINEAR
    resized = [
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
            (size.width, size.height), Image.Resampling.BILINEAR
        )
        for image in images
    ]
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in resized])


def rescale_and_normalize(_: Any, image: torch.Tensor, *__: Any) -> torch.Tensor:
    """The arithmetic of the library's Pillow backend."""
    values = (np.arange(256) * (1 / 255)).astype(np.float32)
    return torch.from_numpy(((values - np.float32(0.5)) / np.float32(0.5))[image.numpy()])


@pytest.fixture(scope="module")
def stock() -> Iterator[Any]:
    """The stock class as it is where torchvision is installed, over Pillow."""
    from transformers.image_processing_backends import TorchvisionBackend

    package = ["torchvision", "transforms", "v2", "functional"]
    names = [".".join(package[:end]) for end in range(1, len(package) + 1)]
    name = "transformers.models.lfm2_vl.image_processing_lfm2_vl"
    with pytest.MonkeyPatch.context() as patch:
        for module in names:
            patch.setitem(sys.modules, module, ModuleType(module))
        patch.setattr(sys.modules[names[-2]], "functional", ModuleType(names[-1]), raising=False)
        found = importlib.import_module(name).Lfm2VlImageProcessor
        patch.setattr(TorchvisionBackend, "resize", resize)
        patch.setattr(TorchvisionBackend, "rescale_and_normalize", rescale_and_normalize)
        yield object.__new__(found)
    sys.modules.pop(name)


def stock_pictures(stock: Any, image: Image.Image, **changes: Any) -> Any:
    """What the stock class's own code returns for a picture; what is not a tile has its size."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    side = _SETTINGS["tile_size"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(stock), "smart_resize", lambda *_, **__: (side, side))
        return stock._preprocess(
            images=[pixels],
            do_resize=True,
            resample=Image.Resampling.BILINEAR,
            do_rescale=True,
            rescale_factor=1 / 255,
            do_normalize=True,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            do_pad=True,
            return_row_col_info=True,
            return_tensors=None,
            disable_grouping=True,
            **{**_SETTINGS, "do_image_splitting": True, "use_thumbnail": True, **changes},
        )


@pytest.mark.parametrize("size", MORE_SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_pixels_and_prompt_are_those_of_the_stock_classes(processor, combined, stock, size):
    image, messages = picture(size), [user_message("what is it?")]
    expected = stock_pictures(stock, image)
    preprocessor = ImagePreprocessor.from_settings(processor.image_processor.settings)
    ours = preprocessor.pixels(image)
    np.testing.assert_array_equal(ours, as_tiles(expected["pixel_values"], 8).numpy())
    np.testing.assert_array_equal(processor.pixels([image]).numpy(), ours)
    grid = preprocessor.grid(image)
    assert (grid.rows, grid.columns) == (expected["image_rows"][0], expected["image_cols"][0])
    text = combined.apply_chat_template(messages, add_generation_prompt=True)
    found = combined(images=[[image]], text=[text], return_tensors="np", add_special_tokens=False)
    assert processor.encode(messages, [grid]) == found["input_ids"][0].tolist()


@pytest.mark.parametrize(
    "changes", [{"use_thumbnail": False}, {"do_image_splitting": False}], ids=str
)
@pytest.mark.parametrize("size", [(640, 480), (100, 100), (60, 300)], ids=str)
def test_settings_are_followed_as_stock_follows_them(stock, size, changes):
    config = {"image_processor_type": "Lfm2VlImageProcessorFast", **_SETTINGS, **changes}
    found = parse_image_settings(config, Path("p.json"), "lfm2_vl")
    expected = stock_pictures(stock, picture(size), **changes)
    ours = ImagePreprocessor.from_settings(found).pixels(picture(size))
    np.testing.assert_array_equal(ours, as_tiles(expected["pixel_values"], 8).numpy())
    assert found.grid(*size).tiles == len(ours)


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(1, 6000),
    height=st.integers(1, 6000),
    fewest=st.integers(1, 4),
    more=st.integers(0, 9),
)
def test_every_grid_is_the_one_of_the_stock_class(stock, width, height, fewest, more):
    tiling = LargeGrid(
        side=512,
        fewest=fewest,
        most=fewest + more,
        patch=16,
        unit=32,
        most_pixels=256 * 32**2 * 2.0,
        has_whole=True,
    )
    is_large = stock._is_image_too_large(height, width, 256, 16, 2, 2.0)
    columns, rows, *_ = stock._get_grid_layout(height, width, fewest, fewest + more, 512)
    expected = TileGrid(rows=rows, columns=columns) if is_large else ONE_TILE
    assert tiling.grid(width, height) == expected
    assert tiling.grid(width, height).tiles <= tiling.most_tiles


def test_a_photo_becomes_the_tiles_of_published_settings():
    found = parse_image_settings({}, Path("p.json"), "lfm2_vl")
    assert found.picture_size == (512, 512)
    assert found.grid(640, 480) == ONE_TILE
    assert found.grid(1024, 768).tiles == 7
    assert found.tiling is not None
    assert found.tiling.most_tiles == 11
    assert found.tiling.limited(5).most_tiles == 5
    assert found.tiling.limited(1).grid(4000, 3000) == ONE_TILE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_size": 60}, "tile_size must be a multiple of encoder_patch_size x downsample_fac"),
        ({"encoder_patch_size": 0}, "tile_size must be a multiple of"),
        ({"max_tiles": 1}, "min_tiles and max_tiles are 2 and 1; allowed are 1 to 64"),
        ({"max_image_tokens": 0}, "max_image_tokens and max_pixels_tolerance must be above 0"),
        ({"max_pixels_tolerance": -1.0}, "max_image_tokens and max_pixels_tolerance must be"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(change, message):
    config = {"image_processor_type": "Lfm2VlImageProcessor", **_SETTINGS, **change}
    with pytest.raises(CheckpointError, match=message):
        parse_image_settings(config, Path("p.json"), "lfm2_vl", error=CheckpointError)


@pytest.mark.parametrize(
    ("splits", "what"),
    [(True, "pictures that are not cut, and wholes after tiles, are"), (False, "pictures are")],
)
def test_what_is_fitted_is_noted(splits, what):
    config = {**_SETTINGS, "do_image_splitting": splits}
    (note,) = parse_image_settings(config, Path("p.json"), "lfm2_vl").notes()
    assert note.startswith(f"{what} fitted to 64 x 64 pixels, where the model's own processor")


def test_an_image_processor_of_other_visual_tokens_is_refused(folder: Path, tmp_path: Path):
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    file = path / "preprocessor_config.json"
    config = json.loads(file.read_text()) | {"downsample_factor": 4}
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="mean 4 placeholders for a tile, but the model mak"):
        Processor.load(path, read_model_folder(path).spec)
