"""Workloads: their shape, their picture, and a prompt of an exact number of tokens.

Rates are comparable only between runs of the same shape, so common published shapes are presets,
and the report holds the whole workload. Picture and prompt are generated, hence the same on every
device; nothing is downloaded.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pocketvlm.errors import InputError
from pocketvlm.files.reader import read_bytes
from pocketvlm.image_file import MAX_FILE_BYTES, read_image
from pocketvlm.runtime.vision import ANY_VISION, VisionChoice

__all__ = [
    "PRESETS",
    "Workload",
    "change_workload",
    "draw_picture",
    "fit_text",
    "load_workload",
    "vary_workload",
]

_MIN_REPEATS = 5
_SENTENCES = (
    "Describe what you see in as many details as you can, from the left to the right. ",
    "Name every object with its colour and say where it is and what stands beside it. ",
    "Count the people, the animals and the cars, and read every word that is written. ",
)
_ENDINGS = ("", ".", " a", " it", " the", "!", " 7", "?")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The shape of one measurement.

    Attributes:
        name: Its name in the report.
        prompt_tokens: Tokens that each turn adds, chat template included, visual tokens not.
        new_tokens: Tokens to generate in each turn, the first one included.
        image_size: Side of the generated square pictures in pixels; `None` for none.
        pictures: Generated pictures of the first turn, each of them another.
        image_files: Pictures to use instead of generated ones.
        vision: The vision graph that sees the pictures, where a bundle has several.
        turns: Turns of the conversation; pictures are shown with the first.
        warm_ups: Answers per process before the measured ones. The first of them is the cold answer
            and is reported separately.
        answers: Measured answers per process.
        repeats: Processes per arm; a figure has `repeats * answers` samples.
        cool_down_s: Pause before every process, in seconds.
        sustained_s: Seconds for which the last process of every arm continues to answer without a
            pause, after its measured answers; `None` for none.
        ignore_eos: Whether generation continues after an end token, so that every answer has
            exactly `new_tokens` tokens.
    """

    name: str
    prompt_tokens: int
    new_tokens: int
    image_size: int | None = None
    pictures: int = 1
    image_files: tuple[Path, ...] = ()
    vision: VisionChoice = ANY_VISION
    turns: int = 1
    warm_ups: int = 1
    answers: int = 1
    repeats: int = _MIN_REPEATS
    cool_down_s: float = 0.0
    sustained_s: float | None = None
    ignore_eos: bool = True

    def __post_init__(self) -> None:
        """Validates ranges.

        Raises:
            ValueError: A field is out of range; the message says what is allowed.
        """
        bounds = {
            "prompt_tokens": (self.prompt_tokens, 1),
            "new_tokens": (self.new_tokens, 2),
            "pictures": (self.pictures, 1),
            "turns": (self.turns, 1),
            "warm_ups": (self.warm_ups, 1),
            "answers": (self.answers, 1),
            "repeats": (self.repeats, _MIN_REPEATS),
            "cool_down_s": (self.cool_down_s, 0),
            "sustained_s": (1 if self.sustained_s is None else self.sustained_s, 1),
        }
        for field, (value, least) in bounds.items():
            if not value >= least:
                raise ValueError(f"workload {self.name!r}: {field} is {value}; at least {least}")
        if self.image_size is not None and self.image_files:
            raise ValueError(
                f"workload {self.name!r}: image_size and image_files exclude each other; "
                "give one of them, or none for text alone"
            )
        if self.vision != ANY_VISION and self.image_size is None and not self.image_files:
            raise ValueError(
                f"workload {self.name!r}: no picture is shown to the vision graph for {self.vision}"
            )
        if self.image_size is not None and not 8 <= self.image_size <= 8192:  # noqa: PLR2004
            raise ValueError(
                f"workload {self.name!r}: image_size is {self.image_size}; 8 to 8192 pixels"
            )

    def encoded_pictures(self) -> tuple[bytes, ...]:
        """The encoded pictures, as from a camera or a chat app; none for text alone.

        Raises:
            InputError: An image file cannot be read, or is not an image.
        """
        if self.image_size is not None:
            return tuple(draw_picture(self.image_size, number) for number in range(self.pictures))
        return tuple(map(_read_picture, self.image_files))


PRESETS: Mapping[str, Workload] = {
    workload.name: workload
    for workload in (
        # One 512-pixel image, a short question, a paragraph of answer.
        Workload(name="vlm", image_size=512, prompt_tokens=32, new_tokens=128),
        # A short prompt, which shows the fixed costs of a runtime.
        Workload(name="short", prompt_tokens=96, new_tokens=64),
        # pp512 and tg128 of llama-bench.
        Workload(name="llama-bench", prompt_tokens=512, new_tokens=128),
        # The defaults of `litert-lm benchmark`.
        Workload(name="litert-lm", prompt_tokens=256, new_tokens=256),
        # Prompt and generation of Core AI's llm-benchmark.
        Workload(name="core-ai", prompt_tokens=512, new_tokens=1024),
    )
}
"""Common published shapes, by name."""


def load_workload(name: str) -> Workload:
    """The preset of this name.

    Raises:
        InputError: There is none.
    """
    if name not in PRESETS:
        raise InputError(f"workload {name!r} is not known; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def change_workload(
    workload: Workload,
    *,
    image_files: tuple[Path, ...] | None = None,
    **changes: float | str | VisionChoice | None,
) -> Workload:
    """The workload with other fields; `None` leaves one as it is.

    Args:
        workload: The workload.
        image_files: Pictures to use instead of generated ones.
        changes: Other values, by the name of the field.

    Raises:
        InputError: A field is out of range; the message says what is allowed.
    """
    given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    if image_files is not None:
        given |= {"image_files": image_files, "image_size": None}
    try:
        return replace(workload, **given)
    except ValueError as fault:
        raise InputError(str(fault)) from fault


def vary_workload(
    workload: Workload,
    *,
    image_sizes: Sequence[int] = (),
    prompt_tokens: Sequence[int] = (),
    visual_tokens: Sequence[int] = (),
    resolutions: Sequence[tuple[int, int]] = (),
) -> tuple[Workload, ...]:
    """The workload with every size of pictures, length of prompt and vision graph, as a grid.

    Args:
        workload: What all of them share.
        image_sizes: Sides of the generated pictures; none for the workload's own.
        prompt_tokens: Lengths of the prompt; none for the workload's own.
        visual_tokens: Tokens per tile of the vision graphs; none for the workload's own.
        resolutions: Widths and heights of what the vision graphs take, likewise.

    Raises:
        InputError: A number is out of range or named twice.
    """
    axes: Mapping[str, Sequence[Any]] = {
        "image_size": image_sizes,
        "prompt_tokens": prompt_tokens,
        "visual_tokens": visual_tokens,
        "resolution": resolutions,
    }
    for name, values in axes.items():
        if len(set(values)) != len(values):
            spelled = ", ".join(
                "x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values
            )
            raise InputError(f"{name}: {spelled} names a value twice")
    varied = [name for name, values in axes.items() if len(values) > 1]
    grid = []
    for image_size, tokens, kept, resolution in product(
        image_sizes or (workload.image_size,),
        prompt_tokens or (workload.prompt_tokens,),
        visual_tokens or (workload.vision.visual_tokens,),
        resolutions or (workload.vision.resolution,),
    ):
        vision = VisionChoice(visual_tokens=kept, resolution=resolution)
        place = {
            "image_size": f"{image_size} px",
            "prompt_tokens": f"{tokens} tokens",
            "visual_tokens": str(replace(vision, resolution=None)),
            "resolution": str(replace(vision, visual_tokens=None)),
        }
        name = ", ".join([workload.name, *(place[axis] for axis in varied)])
        grid.append(
            change_workload(
                workload, name=name, vision=vision, image_size=image_size, prompt_tokens=tokens
            )
        )
    return tuple(grid)


def _read_picture(file: Path) -> bytes:
    content = read_bytes(file, error=InputError, max_bytes=MAX_FILE_BYTES)
    read_image(content, str(file))
    return content


def draw_picture(size: int, number: int = 0) -> bytes:
    """A JPEG of `size` by `size` pixels with smooth areas, edges and texture.

    A flat picture would be unusually fast to decode as JPEG, and noise unusually slow.

    Args:
        size: Its side in pixels.
        number: Which of the pictures of this size; the same number gives the same bytes.
    """
    rows, columns = np.mgrid[0:size, 0:size] / size
    texture = np.random.default_rng(number).normal(0.0, 6.0, (size, size, 1))
    canvas = np.stack([90 + 120 * rows, 140 + 60 * columns, 200 - 110 * rows], axis=-1) + texture
    disc = (rows - 0.35) ** 2 + (columns - 0.3) ** 2 < 0.18**2
    canvas[disc] = (220, 60, 50)
    square = np.maximum(abs(rows - 0.68), abs(columns - 0.7)) < 0.4**2
    stripes = (np.floor((rows + columns) * 40) % 2).astype(bool)
    canvas[square & stripes] = (245, 225, 90)
    canvas[square & ~stripes] = (40, 70, 120)
    stream = io.BytesIO()
    pixels = np.clip(canvas, 0, 255).astype(np.uint8)
    Image.fromarray(np.rot90(pixels, number)).save(stream, format="JPEG", quality=90)
    return stream.getvalue()


def fit_text(count_tokens: Callable[[str], int], tokens: int) -> str:
    """A text whose turn has exactly `tokens` tokens.

    The text is shortened character by character, which changes the count by at most a token or two,
    and several endings are tried until the count is met. Cutting ids to length would be simpler,
    but every answer tokenises the text, and that time is measured.

    Args:
        count_tokens: Counts the tokens of the turn of a text, chat template included.
        tokens: The count to meet.

    Raises:
        InputError: The template alone takes more, or no such text was found.
    """
    least = count_tokens("a")
    if least > tokens:
        raise InputError(
            f"the chat template alone takes {least} tokens of a turn; a workload of {tokens} "
            f"prompt tokens does not fit: ask for {least} or more"
        )
    text = ""
    while count_tokens(text + "a") <= tokens:
        text += "".join(_SENTENCES)
    below, above = 0, len(text)
    while above - below > 1:
        middle = (below + above) // 2
        if count_tokens(text[:middle] + "a") <= tokens:
            below = middle
        else:
            above = middle
    # Counts are not quite monotonic in the length, hence a window instead of one candidate.
    for length in sorted(range(max(0, below - 48), below + 16), key=lambda n: abs(n - below)):
        for ending in _ENDINGS:
            candidate = text[:length] + ending
            if candidate.strip() and count_tokens(candidate) == tokens:
                return candidate
    raise InputError(f"found no text of exactly {tokens} prompt tokens for this tokenizer")
