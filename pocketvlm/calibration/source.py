"""Where samples come from: a folder of conversations, photographs, generated scenes, or noise.

Evaluation reads its data through the same types. Everything is deterministic, and a set is
identified by the digest of its pictures and texts, so that a report can say which set was used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from pocketvlm.calibration.data.folder import read_folder
from pocketvlm.calibration.data.photos import folder_photos, photo_samples, shipped_photos
from pocketvlm.calibration.data.sample import Sample
from pocketvlm.errors import CalibrationError
from pocketvlm.reference import Pictures

if TYPE_CHECKING:  # reading samples needs no torch
    from torch import Tensor

    from pocketvlm.processor import Processor

__all__ = ["CalibrationSet", "Sample", "Split"]

Split = Literal["calibration", "evaluation"]

_SYNTHETIC_SIDE = 384


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationSet:
    """Named samples in a fixed order.

    Attributes:
        name: Where they come from, for people.
        samples: The samples.
        is_synthetic: Whether the pictures are noise, which the report states.
        notes: What was left out or not read, for the report.
    """

    name: str
    samples: tuple[Sample, ...]
    is_synthetic: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.samples:
            raise CalibrationError(f"{self.name}: holds no samples; at least one is needed")

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def pixels(self, processor: Processor, chosen: Sequence[int]) -> Tensor:
        """Pixels of the pictures of some samples, float32 [tiles, channels, height, width].

        Args:
            processor: Cuts and normalizes them.
            chosen: Which samples, by their numbers.

        Raises:
            CalibrationError: A picture cannot be read.
        """
        return processor.pixels([self.samples[index].open_image() for index in chosen])

    @classmethod
    def from_folder(
        cls, path: Path | str, *, limit: int | None = None, require_images: bool = True
    ) -> CalibrationSet:
        """Reads the rows of `data.jsonl` or `data.json`, and their pictures.

        A row is `{"image": "a.png", "question": "...", "answer": "..."}`, or
        `{"image": "a.png", "messages": [{"role": "user", "content": "..."}, ...]}` whose last two
        messages are a question and its answer; `docs/calibration.md` has every way to write one.

        Args:
            path: The folder.
            limit: The most rows that are read; `None` for all.
            require_images: Whether a row without a picture is an error.

        Raises:
            CalibrationError: The folder or a picture is missing, or a row is not valid; the
                message has the file and the line's number.
        """
        folder = Path(path)
        content = read_folder(folder, limit=limit, require_images=require_images)
        return cls(name=folder.name, samples=content.samples, notes=content.notes)

    @classmethod
    def from_reference(
        cls,
        seed: int,
        n: int,
        *,
        split: Split = "calibration",
        pictures: Pictures = "reference",
    ) -> CalibrationSet:
        """Generated scenes of the kind that the reference models were trained on.

        Args:
            seed: Seed within the split.
            n: The number of samples.
            split: Which of the disjoint seed spaces to draw from.
            pictures: Scenes, or mosaics of several.
        """
        from pocketvlm.reference.mosaics import GENERATORS

        samples = tuple(
            Sample(
                image=example.image,
                question=example.question,
                answer=example.answer,
                kind=example.kind,
                where=f"reference scene {index}",
            )
            for index, example in enumerate(GENERATORS[pictures](seed, n, split=split))
        )
        return cls(name=f"{pictures}:{seed} ({split})", samples=samples)

    @classmethod
    def from_photos(
        cls, n: int, seed: int = 0, *, folder: Path | str | None = None
    ) -> CalibrationSet:
        """Photographs that installed packages bring along, with true answers; or a folder's.

        Of a folder's pictures nothing is said: their samples have questions and no answers, so
        stages that need answers refuse them.

        Args:
            n: The number of samples; those beyond the pictures are parts of them.
            seed: Seed of the parts.
            folder: A folder of pictures; `None` for those of packages.

        Raises:
            CalibrationError: There are no pictures, or one cannot be decoded.
        """
        photos = shipped_photos() if folder is None else folder_photos(Path(folder))
        used = photos[:n]
        few = f"photos: {n} samples are {len(used)} photographs and parts of them"
        return cls(
            name="photos" if folder is None else f"photos:{Path(folder).name}",
            samples=photo_samples(used, n, seed=seed),
            notes=(few,) if len(used) < n else (),
        )

    @classmethod
    def synthetic(cls, n: int, seed: int = 0) -> CalibrationSet:
        """Smooth coloured noise with stock questions: better than nothing, and labelled as such.

        Its pictures have the falling spectrum of photographs and no content.

        Args:
            n: The number of samples.
            seed: Seed of the noise.
        """
        samples = tuple(
            Sample(
                image=_noise_image(np.random.default_rng((seed, index))),
                question=_QUESTIONS[index % len(_QUESTIONS)],
                answer=_ANSWERS[index % len(_ANSWERS)],
                where=f"synthetic sample {index}",
            )
            for index in range(n)
        )
        return cls(name=f"synthetic:{seed}", samples=samples, is_synthetic=True)

    def take(self, n: int) -> CalibrationSet:
        """The first `n` samples, or all if there are fewer."""
        return replace(self, samples=self.samples[:n])

    @cached_property
    def sha256(self) -> str:
        """Digest of all pictures and texts, in order."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(sample.digest())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """The set's description for a report: name, size, digest, and the pictures' sizes."""
        sizes = [size for sample in self.samples for size in sample.image_sizes()]
        return {
            "name": self.name,
            "samples": len(self.samples),
            "sha256": self.sha256,
            "is_synthetic": self.is_synthetic,
            "images": len(sizes),
            "image_sizes": len(set(sizes)),
            "smallest_image": list(min(sizes, key=lambda size: size[0] * size[1], default=())),
            "largest_image": list(max(sizes, key=lambda size: size[0] * size[1], default=())),
        }


def _noise_image(rng: np.random.Generator) -> Image.Image:
    """Noise whose amplitude falls as one over frequency, as in photographs."""
    total = np.zeros((_SYNTHETIC_SIDE, _SYNTHETIC_SIDE, 3), dtype=np.float32)
    cells = 3
    while cells <= _SYNTHETIC_SIDE:
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        fine = coarse.resize((_SYNTHETIC_SIDE, _SYNTHETIC_SIDE), Image.Resampling.BICUBIC)
        total += (np.asarray(fine, dtype=np.float32) - 127.5) / cells
        cells *= 2
    total = (total - total.mean()) / total.std()
    return Image.fromarray(np.clip(127.5 + 60.0 * total, 0, 255).astype(np.uint8))


_QUESTIONS = (
    "What is in this picture?",
    "Describe the image in one sentence.",
    "What colors can you see?",
    "Is there any text in the image? If so, what does it say?",
    "How many objects are there?",
    "What is on the left side of the picture?",
    "Where was this photo taken?",
)
_ANSWERS = (
    "The picture shows a blurred surface with soft patches of several colors.",
    "An abstract image without any clear objects.",
    "There are shades of green, brown, blue and gray.",
    "No, there is no text in the image.",
    "I cannot make out any separate objects.",
    "A darker area that fades into a lighter one.",
    "It is not possible to tell from this image.",
)
