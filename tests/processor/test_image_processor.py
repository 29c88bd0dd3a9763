"""Image processors of a folder: what the model would not take is refused when it is read."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from pocketvlm.errors import CheckpointError
from pocketvlm.models.images.idefics3 import Idefics3Geometry
from pocketvlm.pipeline.sources import inspect_model
from pocketvlm.processor.image_processor import ImageProcessor
from tests.conftest import notes_of_ours


@pytest.fixture
def folder(tiny_paths, tmp_path):
    """A copy of a tiny model of a family, and what its processor files are changed to."""

    def make(family, *, image=None, combined=None):
        path = shutil.copytree(tiny_paths[family], tmp_path / family)
        for name, changes in (("preprocessor", image), ("processor", combined)):
            file = path / f"{name}_config.json"
            document = {**json.loads(file.read_text()), **(changes or {})}
            kept = {key: value for key, value in document.items() if value is not ...}
            file.write_text(json.dumps(kept))
        return path

    return make


def test_of_another_size_is_refused_before_any_picture(folder):
    path = folder("llava", image={"size": {"shortest_edge": 64}, "crop_size": 64})
    with pytest.raises(CheckpointError, match="makes pictures of 64 x 64, but .* takes 32 x 32"):
        inspect_model(path)
    path = folder("smolvlm", image={"max_image_size": {"longest_edge": 32}})
    with pytest.raises(CheckpointError, match="makes pictures of 32 x 32, but .* takes 64 x 64"):
        inspect_model(path)


def test_pixels_are_never_other_pictures(tiny_checkpoint):
    """One picture of twice the side has the numbers of four."""
    processor = tiny_checkpoint.processor.image_processor
    side = processor.spec.tower.height * 2
    sizes = {"size": {"height": side, "width": side}, "crop_size": {"height": side, "width": side}}
    if isinstance(processor.settings.geometry, Idefics3Geometry):
        sizes = {"max_image_size": {"longest_edge": side}}
    for name, value in sizes.items():
        setattr(processor.stock, name, value)
    with pytest.raises(CheckpointError, match="1 pictures become pixels of"):
        processor.pixels([Image.new("RGB", (70, 50))])


@pytest.mark.parametrize(
    ("family", "combined", "message"),
    [
        ("llava", {"patch_size": 4}, "means 64 placeholders for a picture"),
        ("llava", {"vision_feature_select_strategy": "full"}, "but the model makes"),
        ("llava", {"num_additional_image_tokens": 0}, "but the model makes"),
        ("llava", {"patch_size": "14"}, "patch_size must be a whole number"),
        ("llava", {"patch_size": 0}, "patch_size must be at least 1"),
        ("smolvlm", {"image_seq_len": 169}, "means 169 placeholders"),
        ("llava", {"processor_class": "Qwen2VLProcessor"}, "not supported for llava"),
        ("smolvlm", {"processor_class": "LlavaProcessor"}, "not supported for smolvlm"),
    ],
)
def test_a_processor_that_does_not_fit_the_model_is_one_line(folder, family, combined, message):
    path = folder(family, combined=combined)
    with pytest.raises(CheckpointError, match=message) as caught:
        inspect_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "image", "combined", "note"),
    [
        ("llava", {"do_convert_rgb": False}, None, "do_convert_rgb is false"),
        ("llava", None, {"patch_size": ...}, "states no patch_size"),
        ("smolvlm", None, {"image_seq_len": ...}, "states no image_seq_len"),
    ],
)
def test_what_is_not_followed_is_a_note(folder, family, image, combined, note):
    _, notes = inspect_model(folder(family, image=image, combined=combined))
    assert [known for known in notes if note in known]


def test_nothing_is_noted_of_a_folder_that_is_followed(tiny_path):
    assert notes_of_ours(inspect_model(tiny_path)[1]) == ()


def test_the_nested_settings_win(folder, tiny_paths):
    own = json.loads((tiny_paths["llava"] / "preprocessor_config.json").read_text())
    path = folder("llava", image={"size": 64}, combined={"image_processor": own})
    spec, notes = inspect_model(path)
    assert any("preprocessor_config.json is not read" in note for note in notes)
    assert ImageProcessor.load(path, spec).pixels([Image.new("RGB", (9, 40))]).shape[-1] == 32
