"""Pictures of any size for models that take any: fitted to one size, then as stock makes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.glm46v import image_processing_pil_glm46v as glm
from transformers.models.paddleocr_vl import image_processing_pil_paddleocr_vl as paddle
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from pocketvlm.checkpoint.config import read_config, read_spec
from pocketvlm.errors import CheckpointError
from pocketvlm.models.images.qwen2_vl import smart_size
from pocketvlm.models.images.reading import parse_image_settings
from pocketvlm.models.images.settings import ImageSettings
from pocketvlm.processor import Processor, user_message
from pocketvlm.processor.patches import join_patches
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.runtime.preprocess import ImagePreprocessor
from tests.processor.test_tiles import SIZES, picture

PUBLISHED = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}


def settings_of(family: str = "qwen_vl", **changes: object) -> ImageSettings:
    document = {**PUBLISHED, **changes}
    return parse_image_settings(document, Path("p.json"), family, error=CheckpointError)


@pytest.fixture(scope="module", params=["qwen2-vl", "qwen2.5-vl", "glm-ocr", "paddleocr-vl"])
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("fitted") / "model"
    write_tiny_model(request.param, path)
    return Processor.load(path, read_spec(read_config(path)))


@pytest.fixture(scope="module")
def stock(processor: Processor):
    import transformers

    from pocketvlm.pipeline.stock import _without_videos

    kind = getattr(transformers, processor.spec.processor.classes[0])
    return _without_videos(kind)(
        image_processor=processor.image_processor.stock,
        tokenizer=processor.tokenizer,
        chat_template=processor.chat_template,
    )


def test_sizes_are_enough():
    assert len(SIZES) >= 50


# Of the library's own code, which calls numpy in the former way on a tensor.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_pixels_and_prompt_are_those_of_stock_for_the_fitted_picture(processor, stock, size):
    """Stock resizes a picture that has the right size to that size, which changes nothing."""
    image, own = picture(size), processor.image_processor.settings
    fitted = image.resize((64, 32), Image.Resampling.BICUBIC)
    messages = [user_message("what is it?")]
    text = stock.apply_chat_template(messages, add_generation_prompt=True)
    expected = stock(images=[fitted], text=[text], return_tensors="pt", add_special_tokens=False)
    assert expected["image_grid_thw"].tolist() == [[1, 4, 8]]
    pixels = join_patches(expected["pixel_values"], (32, 64), patch=8, merge=2)
    ours = ImagePreprocessor.from_settings(own).pixels(image)
    np.testing.assert_array_equal(ours, pixels)
    np.testing.assert_array_equal(processor.pixels([image]).numpy(), ours)
    assert processor.encode(messages) == expected["input_ids"][0].tolist()


def test_a_picture_of_the_size_itself_is_what_stock_makes_of_it_unfitted(processor, stock):
    image = picture((64, 32))
    expected = stock.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    pixels = join_patches(expected, (32, 64), patch=8, merge=2)
    np.testing.assert_array_equal(processor.pixels([image]), pixels)


@settings(max_examples=300)
@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    factor=st.sampled_from([16, 28, 32]),
    least=st.integers(1, 10**5),
    more=st.integers(0, 10**7),
)
def test_the_default_size_is_computed_as_stock_computes_sizes(width, height, factor, least, more):
    if max(width, height) > 200 * min(width, height):  # stock refuses these
        return
    expected = smart_resize(height, width, factor, least, least + more)
    assert (
        smart_size(width, height, factor=factor, least=least, most=least + more) == expected[::-1]
    )


def test_without_a_size_of_its_own_a_picture_is_what_stock_makes_of_a_square_of_448():
    assert settings_of().picture_size == (448, 448)
    assert settings_of(patch_size=16).picture_size == (448, 448)
    small = settings_of(max_pixels=200 * 200)
    stock = Qwen2VLImageProcessorPil(max_pixels=200 * 200, min_pixels=3136)
    grid = stock(images=[picture((448, 448))], return_tensors="np")["image_grid_thw"][0]
    assert small.picture_size == (grid[1] * 14, grid[2] * 14) == (196, 196)
    nested = settings_of(size={"shortest_edge": 3136, "longest_edge": 40000}, max_pixels=None)
    assert nested.picture_size == (196, 196)
    (note,) = settings_of().notes()
    assert note.startswith("pictures are fitted to one size, 448 x 448 pixels unless")


@settings(max_examples=100)
@given(
    patch=st.integers(1, 128),
    merge=st.integers(1, 8),
    least=st.integers(1, 10**6),
    more=st.integers(0, 10**7),
)
def test_other_kinds_make_of_that_square_what_their_classes_make_of_it(patch, merge, least, more):
    size = {"shortest_edge": least, "longest_edge": least + more}
    own = {"patch_size": patch, "merge_size": merge, "size": size}
    own |= {"min_pixels": None, "max_pixels": None, "image_processor_type": None}
    bounds = {"factor": patch * merge, "min_pixels": least, "max_pixels": least + more}
    expected = {
        "glm_ocr": glm.smart_resize(2, 448, 448, temporal_factor=2, **bounds),
        "paddleocr_vl": paddle.smart_resize(448, 448, **bounds),
    }
    for family, found in expected.items():
        assert settings_of(family, **own).picture_size == found


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("glm_ocr", glm.Glm46VImageProcessorPil),
        ("paddleocr_vl", paddle.PaddleOCRVLImageProcessorPil),
    ],
)
def test_defaults_are_those_of_the_class(family, kind):
    found = parse_image_settings({}, Path("p.json"), family, error=CheckpointError)
    stock = kind()
    grid = stock(images=[picture((448, 448))], return_tensors="np")["image_grid_thw"][0]
    assert found.picture_size == (grid[1] * 14, grid[2] * 14)
    assert list(found.image_mean) == list(stock.image_mean)
    assert list(found.image_std) == list(stock.image_std)
    assert (found.resample, found.rescale_factor) == (stock.resample, stock.rescale_factor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, "do_resize must be true"),
        ({"size": {"height": 448, "width": 448}, "max_pixels": None}, "must name shortest_edge"),
        ({"patch_size": 0}, "patch_size must be 1 to 128"),
        ({"merge_size": 1000}, "merge_size must be 1 to 128"),
        ({"min_pixels": 50, "max_pixels": 40}, "no shorter longest_edge"),
        ({"fitted_size": {"height": 448}}, "fitted_size must name height and width"),
        ({"fitted_size": {"height": 0, "width": 448}}, "between 1 and"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        settings_of(**changes)
    assert "\n" not in str(caught.value)
