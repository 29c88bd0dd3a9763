"""Photographs: those that common packages bring along, or a folder of a user's own.

Towers see other statistics on photographs than on noise or on drawn scenes, and a demonstration is
told by one. Nothing is downloaded: scikit-learn, which pocketvlm needs anyway, brings two of them,
and scikit-image, where it is installed, eight more. More samples than there are pictures are parts
of them, at other sizes and ratios of sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from pocketvlm.calibration.data.sample import Sample
from pocketvlm.errors import CalibrationError, InputError
from pocketvlm.image_file import open_image

__all__ = ["Photo", "folder_photos", "photo_samples", "shipped_photos"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm")
_LONGEST_SIDE = 768
"""The longest side of a picture that parts are cut of, in pixels."""
_SMALLEST_SHARE = 0.7
"""The least of a side that a part keeps: what is asked about stays in sight."""


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A photograph, and what can be said of it.

    Attributes:
        path: Its file.
        said: Questions and their answers.
    """

    path: Path
    said: tuple[tuple[str, str], ...]


def shipped_photos() -> tuple[Photo, ...]:
    """The photographs of the packages that are installed, always in the same order.

    Raises:
        CalibrationError: None of the packages is.
    """
    found = []
    for package, place, photos in _SHIPPED:
        spec = find_spec(package)
        roots = spec.submodule_search_locations if spec is not None else None
        for name, said in photos.items() if roots else ():
            path = Path(roots[0], place, name) if roots else Path(name)
            if path.is_file():
                found.append(Photo(path=path, said=said))
    if not found:
        raise CalibrationError(
            "photos: neither scikit-learn nor scikit-image is installed, which bring photographs; "
            "photos:FOLDER takes your own"
        )
    return tuple(found)


def folder_photos(folder: Path) -> tuple[Photo, ...]:
    """The pictures of a folder, by name; of them nothing is said.

    Raises:
        CalibrationError: There is no folder, or no picture in it.
    """
    if not folder.is_dir():
        raise CalibrationError(f"photos:{folder}: is not a folder; expected one of pictures")
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not names:
        raise CalibrationError(f"photos:{folder}: holds no picture ({', '.join(_SUFFIXES)})")
    return tuple(
        Photo(path=folder / name, said=tuple((question, "") for question in _QUESTIONS))
        for name in names
    )


def photo_samples(photos: Sequence[Photo], n: int, *, seed: int) -> tuple[Sample, ...]:
    """Samples about photographs: each as a whole, then parts of them, one after the other.

    Args:
        photos: At least one.
        n: The number of samples.
        seed: Seed of the parts.

    Raises:
        CalibrationError: A picture cannot be decoded.
    """
    samples: list[Sample | None] = [None] * n
    for number, photo in enumerate(photos):
        parts = range(number, n, len(photos))
        shrunk = _shrunk(photo.path) if len(parts) > 1 else None
        for turn, index in enumerate(parts):
            question, answer = photo.said[turn % len(photo.said)]
            part = turn and shrunk and _part(shrunk, np.random.default_rng((seed, index)))
            samples[index] = Sample(
                image=part or photo.path,
                question=question,
                answer=answer,
                where=f"{photo.path} (part {turn})" if part else str(photo.path),
            )
    return tuple(sample for sample in samples if sample is not None)


def _shrunk(path: Path) -> Image.Image:
    try:
        image = open_image(path)
    except InputError as error:
        raise CalibrationError(str(error)) from error
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    return image


def _part(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A part of random size, ratio of sides and place."""
    shares = rng.uniform(_SMALLEST_SHARE, 1.0, size=2)
    width, height = (
        max(1, round(share * side)) for share, side in zip(shares, image.size, strict=True)
    )
    left, top = (
        int(rng.integers(0, side - kept + 1))
        for side, kept in zip(image.size, (width, height), strict=True)
    )
    return image.crop((left, top, left + width, top + height))


_QUESTIONS = (
    "What is in this picture?",
    "Describe the image in one sentence.",
    "What colors can you see?",
    "Is there any text in the image? If so, what does it say?",
)
_DESCRIBE = "Describe the image in one sentence."
_SHIPPED: tuple[tuple[str, str, dict[str, tuple[tuple[str, str], ...]]], ...] = (
    (
        "sklearn",
        "datasets/images",
        {
            "china.jpg": (
                ("What is in this picture?", "A tall Chinese pavilion with tiled roofs."),
                (_DESCRIBE, "A pavilion with red columns rises above trees beside a wide lake."),
            ),
            "flower.jpg": (
                ("What is in this picture?", "An orange dahlia in bloom."),
                (_DESCRIBE, "A round orange flower stands before dark green leaves."),
            ),
        },
    ),
    (
        "skimage",
        "data",
        {
            "astronaut.png": (
                ("Who is in this picture?", "An astronaut in an orange suit, smiling."),
                (_DESCRIBE, "An astronaut sits before a flag and a model of a space shuttle."),
            ),
            "chelsea.png": (
                ("Which animal is this?", "A cat."),
                (_DESCRIBE, "The face of a tabby cat with green eyes, seen from close by."),
            ),
            "coffee.png": (
                ("What is in the cup?", "Coffee."),
                (_DESCRIBE, "A red cup of coffee and a spoon on a saucer on a wooden table."),
            ),
            "rocket.jpg": (
                ("What stands between the towers?", "A white rocket."),
                (_DESCRIBE, "A rocket on its launch pad at dusk, among lattice towers."),
            ),
            "motorcycle_left.png": (
                ("What color is the motorcycle?", "Red."),
                (_DESCRIBE, "A red motorcycle stands in a garage before shelves."),
            ),
            "camera.png": (
                ("What is the man doing?", "He looks through a camera on a tripod."),
                (_DESCRIBE, "A man in a dark coat works with a camera on a lawn."),
            ),
            "coins.png": (
                ("What is in this picture?", "Old coins in four rows."),
                (_DESCRIBE, "A black and white photograph of ancient coins."),
            ),
            "page.png": (
                ("What does the heading say?", "Region-based segmentation."),
                (_DESCRIBE, "A photograph of a printed page about region-based segmentation."),
            ),
        },
    ),
)
