"""Pixels equal Hugging Face's Pillow processors bit for bit, over sizes, modes and settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor

from pocketvlm.calibration.data.photos import shipped_photos
from pocketvlm.errors import BundleError, InputError
from pocketvlm.image_file import open_image
from pocketvlm.json_io import write_json
from pocketvlm.models.images.reading import parse_image_settings
from pocketvlm.runtime.preprocess import ImagePreprocessor

from .conftest import noise

CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 24},
    "crop_size": {"height": 24, "width": 24},
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
IDEFICS3 = {
    "image_processor_type": "Idefics3ImageProcessor",
    "size": {"longest_edge": 40},
    "max_image_size": {"longest_edge": 24},
    "do_image_splitting": False,
    "resample": 1,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
CONFIGS = {
    "clip": CLIP,
    "clip-odd-crop": {**CLIP, "size": {"shortest_edge": 30}, "crop_size": 21},
    "clip-crop-wider-than-picture": {**CLIP, "size": {"shortest_edge": 19}, "crop_size": 24},
    "clip-int-size": {**CLIP, "size": 24, "resample": 2},
    "clip-defaults": {
        key: value for key, value in CLIP.items() if key not in ("image_mean", "image_std")
    },
    "clip-no-normalize": {**CLIP, "do_normalize": False},
    "clip-own-factor": {**CLIP, "rescale_factor": 0.007},
    "siglip": {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 24, "width": 24},
        "resample": 2,
    },
    "siglip-int-size-and-crop": {
        "image_processor_type": "SiglipImageProcessorFast",
        "size": 30,
        "do_center_crop": True,
        "crop_size": [24, 24],
    },
    "siglip-defaults": {"image_processor_type": "SiglipImageProcessor"},
    "clip-own-defaults": {"image_processor_type": "CLIPImageProcessorFast"},
    "clip-nulls": {
        **CLIP,
        "size": [24, 24],
        "crop_size": None,
        "do_center_crop": None,
        "do_rescale": None,
        "rescale_factor": None,
    },
    "clip-crop-alone": {**CLIP, "do_resize": False},
    "clip-square-of-a-number": {**CLIP, "size": 24, "default_to_square": True},
    "clip-resized-out-of-shape": {**CLIP, "size": {"height": 31, "width": 40}},
    "clip-one-mean": {**CLIP, "image_mean": 0.4, "image_std": 0.25},
    "clip-raw": {**CLIP, "do_rescale": False},
    "clip-no-crop": {**CLIP, "do_center_crop": False, "size": [24, 24]},
    "clip-padded-batch": {**CLIP, "do_pad": True},
    "clip-pil-name": {**CLIP, "image_processor_type": "CLIPImageProcessorPil"},
    "feature-extractor": {
        **{key: value for key, value in CLIP.items() if key != "image_processor_type"},
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": 24,
        "crop_size": 24,
    },
    "llava": {**CLIP, "image_processor_type": "LlavaImageProcessor"},
    "llava-padded": {**CLIP, "image_processor_type": "LlavaImageProcessor", "do_pad": True},
    "llava-padded-defaults": {
        "image_processor_type": "LlavaImageProcessorFast",
        "do_pad": True,
        "size": [24, 24],
        "do_center_crop": False,
    },
    "idefics3": IDEFICS3,
    "idefics3-defaults": {"image_processor_type": "Idefics3ImageProcessor"},
    "smolvlm-defaults": {"image_processor_type": "SmolVLMImageProcessorFast"},
    "idefics3-one-step": {**IDEFICS3, "do_resize": False},
    "idefics3-square-first": {**IDEFICS3, "size": {"height": 50, "width": 33}},
    "idefics3-int-size": {**IDEFICS3, "size": 31, "do_pad": False},
    "idefics3-larger-than-limit": {**IDEFICS3, "size": {"longest_edge": 4100}},
    "idefics3-tiles-configured": {**IDEFICS3, "do_image_splitting": True},
}
LARGE = {name for name in CONFIGS if name.endswith(("-defaults", "-larger-than-limit"))}
MODES = ("RGB", "RGBA", "L", "LA", "P", "CMYK", "YCbCr", "HSV", "1", "I;16", "I", "F")


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory):
    """Hugging Face's processor of each config."""
    loaded = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(name)
        write_json(folder / "preprocessor_config.json", config)
        loaded[name] = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return loaded


def read(config: dict[str, object], family: str = "llava") -> ImagePreprocessor:
    """Ours of one config."""
    return ImagePreprocessor.from_settings(parse_image_settings(config, Path("c"), family))


def preprocessor(name: str) -> ImagePreprocessor:
    """Ours of each config."""
    family = "idefics3" if name.startswith(("idefics3", "smolvlm")) else "llava"
    return read(CONFIGS[name], family)


def reference(processor, image: Image.Image) -> np.ndarray:
    batch = processor(images=[[image]], return_tensors="np", do_convert_rgb=True)
    return np.asarray(batch["pixel_values"]).reshape(-1, 3, *batch["pixel_values"].shape[-2:])


def picture(mode: str, width: int, height: int, seed: int) -> Image.Image:
    source = noise(seed, (width, height))
    if mode == "I;16":
        values = np.random.default_rng(seed).integers(0, 2**16, (height, width), np.uint16)
        return Image.fromarray(values)
    if mode in ("RGBA", "LA"):
        source.putalpha(noise(seed + 1, (width, height)).convert("L"))
    return source.convert(mode)


@settings(deadline=None, max_examples=20)
@given(
    mode=st.sampled_from(MODES),
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    seed=st.integers(0, 999),
)
@pytest.mark.parametrize("name", sorted(set(CONFIGS) - LARGE))
def test_equal_to_hugging_face_bit_for_bit(processors, name, mode, width, height, seed):
    image = picture(mode, width, height, seed)
    found = preprocessor(name).pixels(image)
    assert found.dtype == np.float32
    assert np.array_equal(found, reference(processors[name], image))


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (1000, 2), (640, 480), (241, 1023)])
def test_equal_at_uncommon_sizes(processors, name, size):
    image = picture("RGB", *size, seed=7)
    found = preprocessor(name).pixels(image)
    assert np.array_equal(found, reference(processors[name], image))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_equal_on_photographs(processors, name):
    """Their spectrum is not that of noise: other pixels come out between two grey levels."""
    for photo in shipped_photos()[:2]:
        image = open_image(photo.path)
        assert np.array_equal(preprocessor(name).pixels(image), reference(processors[name], image))


def test_palette_with_a_transparent_entry_shows_white(processors):
    image = noise(1).quantize(8)
    image.info["transparency"] = 3
    found = read(CLIP).pixels(image)
    assert np.array_equal(found, reference(processors["clip"], image))
    del image.info["transparency"]
    assert not np.array_equal(found, read(CLIP).pixels(image))


def test_equals_the_checkpoints_processor(pair):
    for image in (noise(3), noise(4, (31, 77)).convert("RGBA"), noise(5, (1, 1))):
        expected = pair.checkpoint.processor.pixels([image]).numpy()
        assert np.array_equal(ImagePreprocessor.from_bundle(pair.bundle).pixels(image), expected)


def test_endless_strip_is_cut_to_its_middle_within_memory():
    """Resized whole, it would take 24 x 9.6 million pixels."""
    strip = Image.new("RGB", (400_000, 1))
    strip.paste((255, 255, 255), (199_968, 0, 200_032, 1))
    found = read(CLIP).pixels(strip)
    assert found.shape == (1, 3, 24, 24)
    assert (found > 1.9).all()


def test_empty_picture_is_an_error():
    with pytest.raises(InputError, match="0 x 5 pixels"):
        read(CLIP).pixels(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, "'ViTImageProcessor' is not supported"),
        ({"do_center_crop": False}, "do_center_crop must be true"),
        ({"do_resize": False, "do_center_crop": False}, "do_resize must be true without"),
        ({"size": {"max_height": 3, "max_width": 3}}, "size names max_height and max_width"),
        ({"size": {"shortest_edge": 3, "longest_edge": 4}}, "size names shortest_edge and"),
        ({"size": {"height": 3, "width": 4}, "do_center_crop": False}, "size must be a square"),
        ({"size": {}}, "size names nothing"),
        ({"size": [24]}, "size must have two numbers"),
        ({"size": "24"}, "size: must be"),
        ({"size": 0}, "size must be between 1 and"),
        ({"size": {"shortest_edge": 10**9}}, "size must be between 1 and"),
        ({"crop_size": {"height": 3, "width": 4}}, "crop_size must be a square"),
        ({"size": None}, "size must not be null"),
        ({"resample": None}, "resample must not be null"),
        ({"image_mean": None}, "image_mean must not be null"),
        ({"do_resize": None, "do_center_crop": False}, "do_resize must be true without"),
        ({"pad_size": 32}, "pad_size is not supported"),
        ({"resample": 77}, "resample is 77"),
        ({"resample": "bicubic"}, "resample: must be"),
        ({"do_resize": "yes"}, "do_resize: must be"),
        ({"image_mean": [0.5]}, "image_mean must have 3 numbers"),
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std must be between 1e-06 and"),
        ({"image_mean": [1e30, 0.0, 0.0]}, "image_mean must be between"),
        ({"rescale_factor": 1e308}, "rescale_factor must be above 0"),
        ({"rescale_factor": 0}, "rescale_factor must be above 0"),
        ({"input_data_format": "channels_last"}, "input_data_format must be channels_first"),
        ({"image_processor_type": "Idefics3ImageProcessor"}, "not supported for llava"),
        ({"do_image_splitting": "yes"}, "do_image_splitting: must be"),
        ({"max_tiles": [3]}, "max_tiles: must be"),
        ({"image_grid_pinpoints": "336"}, "image_grid_pinpoints: must be"),
    ],
)
def test_settings_that_are_not_supported_are_named(change, message):
    with pytest.raises(BundleError, match=message):
        read({**CLIP, **change})


def test_settings_of_other_kinds_change_nothing():
    others = {"do_image_splitting": True, "max_tiles": 3, "max_pixels": None, "patch_size": 14}
    found = [parse_image_settings(x, Path("c"), "llava") for x in (CLIP, {**CLIP, **others})]
    assert found[0] == found[1]


def test_bundle_is_checked_against_its_graph(llava, tmp_path):
    import shutil

    from pocketvlm.bundle import Bundle

    folder = tmp_path / "bundle"
    shutil.copytree(llava.bundle.path, folder)
    write_json(folder / "preprocessor_config.json", CLIP)
    bundle = Bundle.open(folder, verify=False)
    with pytest.raises(BundleError, match=r"\(1, 3, 24, 24\), but onnx/vision.onnx takes"):
        ImagePreprocessor.from_bundle(bundle)
    # Settings nested in processor_config.json win, as in Hugging Face.
    write_json(
        folder / "processor_config.json",
        {"image_processor": {**CLIP, "size": {"shortest_edge": 32}, "crop_size": 32}},
    )
    assert ImagePreprocessor.from_bundle(bundle).geometry.crop == 32
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(BundleError, match=r"preprocessor_config.json .* is missing"):
        ImagePreprocessor.from_bundle(bundle)
