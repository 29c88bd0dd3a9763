"""Photographs of installed packages and of users, as calibration samples."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
from PIL import Image

from pocketvlm.calibration.data import photos
from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.errors import CalibrationError
from pocketvlm.pipeline.sources import resolve_calibration
from pocketvlm.recipes.load import CalibrationOptions


@pytest.fixture
def folder(tmp_path):
    """Two pictures, one of them with more pixels than parts are cut of, and a file that is none."""
    made = tmp_path / "mine"
    made.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("b.JPG", (900, 1200, 3)), ("a.png", (30, 40, 3))):
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(made / name)
    (made / "notes.txt").write_text("no picture")
    return made


def test_scikit_learn_always_brings_some_with_answers(tiny_checkpoint):
    samples = CalibrationSet.from_photos(n=6)
    assert not samples.is_synthetic
    first = {str(sample.image).rpartition("/")[2] for sample in samples.samples[:2]}
    assert first == {"china.jpg", "flower.jpg"}
    assert samples.samples[0].open_image().size == (640, 427)
    assert all(prompt.has_answer for prompt in encode_samples(tiny_checkpoint.processor, samples))


def test_more_samples_than_pictures_are_different_parts_of_them(folder):
    samples = CalibrationSet.from_photos(n=7, seed=3, folder=folder)
    assert samples.notes == ("photos: 7 samples are 2 photographs and parts of them",)
    assert [sample.image for sample in samples.samples[:2]] == [folder / "a.png", folder / "b.JPG"]
    sizes = [sample.open_image().size for sample in samples.samples[2:]]
    assert len(set(sizes)) == len(sizes)
    for (width, height), (full_width, full_height) in zip(
        sizes, [(40, 30), (768, 576)] * 3, strict=False
    ):
        assert 0.69 * full_width <= width <= full_width
        assert 0.69 * full_height <= height <= full_height
    assert all(sample.answer == "" for sample in samples)
    again = CalibrationSet.from_photos(n=7, seed=3, folder=folder)
    assert samples.sha256 == again.sha256
    assert samples.sha256 != CalibrationSet.from_photos(n=7, seed=4, folder=folder).sha256


def test_fewer_samples_than_pictures_are_whole_pictures(folder):
    samples = CalibrationSet.from_photos(n=1, folder=folder)
    assert [sample.image for sample in samples] == [folder / "a.png"]
    assert samples.notes == ()


def test_pictures_of_every_package_that_is_there(folder, monkeypatch):
    """As with scikit-image installed: its folder has one of its pictures."""
    (folder / "data").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "data" / "coffee.png")

    def found(name):
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        return spec if name == "skimage" else real(name)

    real = importlib.util.find_spec
    monkeypatch.setattr(photos, "find_spec", found)
    named = [photo.path.name for photo in photos.shipped_photos()]
    assert named == ["china.jpg", "flower.jpg", "coffee.png"]
    monkeypatch.setattr(photos, "find_spec", lambda _: None)
    with pytest.raises(CalibrationError, match="photos:FOLDER takes your own"):
        CalibrationSet.from_photos(n=1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("photos:", "names no folder"),
        ("photos:nowhere", "is not a folder"),
        ("photos:{empty}", r"holds no picture \(\.jpg"),
        ("photos:{broken}", "a.png"),
    ],
)
def test_folders_without_photographs_are_one_clear_line(source, message, tmp_path):
    places = {"empty": tmp_path / "empty", "broken": tmp_path / "broken"}
    for place in places.values():
        place.mkdir()
    (places["broken"] / "a.png").write_bytes(b"no picture")
    options = CalibrationOptions(source=source.format(**places), samples=3)
    with pytest.raises(CalibrationError, match=message) as caught:
        resolve_calibration(options, pictures=None)
    assert "\n" not in str(caught.value)


def test_a_name_means_the_packages_photographs():
    samples = resolve_calibration(CalibrationOptions(source="photos", samples=2), pictures=None)
    assert samples.name == "photos"
