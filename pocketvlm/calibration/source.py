"""Where samples come from: a folder of pictures and conversations, generated scenes, or noise.

Evaluation reads its data through the same types. Everything is deterministic, and a set is known by
the digest of its pictures and words, so that a report can say what it was calibrated on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from pocketvlm.errors import CalibrationError, InputError
from pocketvlm.files import locate, read_bytes
from pocketvlm.image_file import MAX_FILE_BYTES, image_size, open_image

__all__ = ["CalibrationSet", "Sample", "Split"]

Split = Literal["calibration", "evaluation"]

_DATA = "data.jsonl"
_ROLES = ("system", "user", "assistant")
_SYNTHETIC_SIDE = 384


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One picture, one question about it and the expected answer.

    Attributes:
        image: The picture or its file; `None` for text alone.
        question: The last thing the user says.
        answer: What the assistant should say to it.
        kind: Which sort of question it is, where that is known.
        history: Turns before the question, as (role, text); the picture belongs to the first
            turn of the user.
        where: File and line that the sample came from, for messages.
    """

    image: Path | Image.Image | None
    question: str
    answer: str
    kind: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    where: str = "sample"

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """Every turn but the answer, as (role, text)."""
        return (*self.history, ("user", self.question))

    def open_image(self) -> Image.Image:
        """The decoded picture, upright; read exactly as the runtime reads an app's pictures.

        Raises:
            CalibrationError: There is none, or it cannot be decoded.
        """
        if self.image is None:
            raise CalibrationError(f"{self.where}: has no image; every sample needs one")
        if isinstance(self.image, Image.Image):
            return self.image
        try:
            return open_image(self.image)
        except InputError as error:
            raise CalibrationError(f"{self.where}: {error}") from error

    def image_size(self) -> tuple[int, int] | None:
        """Width and height, read without decoding; `None` for text alone.

        Raises:
            CalibrationError: The file is missing, is no picture, or holds too many pixels.
        """
        if self.image is None or isinstance(self.image, Image.Image):
            return None if self.image is None else self.image.size
        try:
            return image_size(self.image)
        except InputError as error:
            raise CalibrationError(f"{self.where}: {error}") from error


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationSet:
    """Named samples in a fixed order.

    Attributes:
        name: Where they come from, for people.
        samples: The samples.
        is_synthetic: Whether the pictures are noise, which the report then says.
    """

    name: str
    samples: tuple[Sample, ...]
    is_synthetic: bool = False

    def __post_init__(self) -> None:
        if not self.samples:
            raise CalibrationError(f"{self.name}: holds no samples; at least one is needed")

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @classmethod
    def from_folder(cls, path: Path | str, *, require_images: bool = True) -> CalibrationSet:
        """Reads `data.jsonl`, one sample a line, and the pictures beside it.

        A line is `{"image": "a.png", "question": "...", "answer": "..."}`, or
        `{"image": "a.png", "messages": [{"role": "user", "content": "..."}, ...]}` whose last two
        messages are a question and its answer.

        Args:
            path: The folder.
            require_images: Whether a line without a picture is an error.

        Raises:
            CalibrationError: The folder or a picture is missing, or a line is not valid; the
                message has the file and the line's number.
        """
        folder = Path(path)
        data = folder / _DATA
        if not folder.is_dir():
            raise CalibrationError(f"{folder}: is no folder; expected one that holds {_DATA}")
        if not data.is_file():
            raise CalibrationError(f"{folder}: {_DATA} is missing; it holds a JSON object a line")
        samples = []
        try:
            lines = data.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{data}: cannot be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                sample = _read_line(line, folder, f"{data}:{number}")
                if sample.image is None and require_images:
                    raise CalibrationError(
                        f'{sample.where}: a conversation without a picture; expected "image" '
                        "beside the text, since a vision-language model is calibrated on both"
                    )
                sample.image_size()
                samples.append(sample)
        if not samples:
            raise CalibrationError(f"{data}: is empty; expected a JSON object a line")
        return cls(name=folder.name, samples=tuple(samples))

    @classmethod
    def from_reference(cls, seed: int, n: int, *, split: Split = "calibration") -> CalibrationSet:
        """Generated scenes of the kind that the reference models were trained on.

        Args:
            seed: Seed inside of the split.
            n: How many.
            split: Which of the disjoint seed spaces to draw from.
        """
        from pocketvlm.reference.questions import generate_examples

        samples = tuple(
            Sample(
                image=example.image,
                question=example.question,
                answer=example.answer,
                kind=example.kind,
                where=f"reference scene {index}",
            )
            for index, example in enumerate(generate_examples(seed, n, split=split))
        )
        return cls(name=f"reference:{seed} ({split})", samples=samples)

    @classmethod
    def synthetic(cls, n: int, seed: int = 0) -> CalibrationSet:
        """Smooth coloured noise with stock questions: better than nothing, and declared as such.

        Its pictures have the falling spectrum of photographs and no content.

        Args:
            n: How many.
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
        """The first `n` samples, or all where there are fewer."""
        return replace(self, samples=self.samples[:n])

    @cached_property
    def sha256(self) -> str:
        """Digest of all pictures and words, in order."""
        digest = hashlib.sha256()
        for sample in self.samples:
            words = json.dumps([*sample.turns, ("assistant", sample.answer)], ensure_ascii=False)
            digest.update(words.encode())
            digest.update(_image_digest(sample))
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a report says of the set: name, size, digest, and the pictures' sizes."""
        sizes = [size for sample in self.samples if (size := sample.image_size()) is not None]
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


def _read_line(line: str, folder: Path, where: str) -> Sample:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where}: is no JSON: {error.msg}") from error
    if not isinstance(record, dict):
        raise CalibrationError(f"{where}: is a JSON {type(record).__name__}, not an object")
    image = record.get("image")
    if image is not None and not isinstance(image, str):
        raise CalibrationError(f'{where}: "image" must be a file name, not {image!r}')
    kind = record.get("kind")
    turns = _read_turns(record, where)
    return Sample(
        image=None if image is None else _locate(folder, image, where),
        question=turns[-2][1],
        answer=turns[-1][1],
        kind=kind if isinstance(kind, str) else None,
        history=tuple(turns[:-2]),
        where=where,
    )


def _locate(folder: Path, image: str, where: str) -> Path:
    try:
        return locate(folder, image, error=CalibrationError)
    except CalibrationError as error:
        raise CalibrationError(f"{where}: image {error}") from error


def _read_turns(record: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    if "messages" not in record:
        for key in ("question", "answer"):
            if not isinstance(record.get(key), str):
                raise CalibrationError(
                    f'{where}: "{key}" must be text; expected "question" and "answer", '
                    'or "messages"'
                )
        return [("user", record["question"]), ("assistant", record["answer"])]
    messages = record["messages"]
    if not isinstance(messages, list):
        raise CalibrationError(f'{where}: "messages" must be a list, not {messages!r}')
    turns = [_read_message(message, where) for message in messages]
    if [role for role, _ in turns[-2:]] != ["user", "assistant"]:
        raise CalibrationError(
            f'{where}: "messages" must end with a message of the user and one of the assistant'
        )
    return turns


def _read_message(message: object, where: str) -> tuple[str, str]:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(message, dict) or role not in _ROLES:
        raise CalibrationError(f"{where}: role {role!r} is unknown; allowed: {', '.join(_ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        texts = [
            item.get("text", "")
            for item in content
            if isinstance(item, dict) and item.get("type") == "text"
        ]
        content = " ".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str):
        raise CalibrationError(f'{where}: "content" must be text, not {content!r}')
    return role, content


def _image_digest(sample: Sample) -> bytes:
    if sample.image is None:
        return b"\0"
    if isinstance(sample.image, Image.Image):
        header = f"{sample.image.mode} {sample.image.size}".encode()
        return hashlib.sha256(header + sample.image.tobytes()).digest()
    content = read_bytes(sample.image, error=CalibrationError, max_bytes=MAX_FILE_BYTES)
    return hashlib.sha256(content).digest()


def _noise_image(rng: np.random.Generator) -> Image.Image:
    """Noise whose amplitude falls as one over frequency, as that of photographs does."""
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
