"""Scenes: a few coloured shapes and at most one written word on a quiet background.

A scene is symbolic first (:class:`Scene`) and pixels second (:func:`render`), so that every
question has an answer that can be computed, and every patch of the picture a label that is known.

The canvas is a 4x4 grid of cells. An object stays inside its cell and a word inside two
neighbouring cells, so nothing overlaps and, with at most four objects, at least 40 of the 64
patches of 16 pixels show background alone: as in a photograph, most of the picture says nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "CANVAS",
    "CELL",
    "COLORS",
    "GRID",
    "MAX_OBJECTS",
    "PATCH_GRID",
    "SHAPES",
    "SIZES",
    "WORDS",
    "Background",
    "Scene",
    "SceneObject",
    "WrittenWord",
    "object_coverage",
    "render",
    "sample_scene",
    "word_coverage",
]

CANVAS = 128
"""Side of the square canvas in pixels; both reference models take it as it is."""
GRID = 4
"""Cells per side. Two cells per quadrant and side, so "top left" has no doubtful cases."""
CELL = CANVAS // GRID
PATCH_GRID = 8
"""Visual tokens per side, of both models."""
MAX_OBJECTS = 4

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 40),
    "green": (36, 148, 52),
    "blue": (38, 84, 204),
    "yellow": (238, 208, 32),
    "purple": (140, 52, 172),
    "orange": (244, 128, 20),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star")
SIZES: tuple[str, ...] = ("small", "large")
WORDS: tuple[str, ...] = (
    "ant", "bag", "bus", "cat", "cup", "dog", "egg", "fox", "hat", "ice", "jam", "key",
    "lid", "map", "net", "owl", "pen", "pig", "rug", "sun", "tea", "van", "web", "zoo",
)  # fmt: skip

_RADIUS = {"small": (6.5, 8.0), "large": (12.5, 14.5)}
_SUPERSAMPLING = 2  # draw at twice the size and average: smooth edges without a drawing library
_LETTERS = ImageFont.load_default_imagefont()  # Pillow's own bitmap: the same pixels everywhere
_LETTER_SCALE = 2
_TEXT_STEP = 8  # text snaps to a layout grid, as on a screen: reading it is not what takes long

Style = Literal["plain", "gradient", "noisy"]


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One shape, inside one cell of the layout grid."""

    shape: str
    color: str
    size: str
    row: int
    col: int
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class WrittenWord:
    """A word written across the cells ``(row, col)`` and ``(row, col + 1)``."""

    text: str
    row: int
    col: int
    x: int
    y: int
    ink: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Background:
    """The background of the objects: one tone, a ramp between two tones, or one tone with grain."""

    style: Style
    start: tuple[int, int, int]
    end: tuple[int, int, int]
    angle: float
    noise_seed: int


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything that is in a picture."""

    objects: tuple[SceneObject, ...]
    word: WrittenWord | None
    background: Background


def sample_scene(
    rng: np.random.Generator,
    *,
    max_objects: int = MAX_OBJECTS,
    word: str | None = None,
    word_probability: float = 0.4,
) -> Scene:
    """Draws a scene.

    Args:
        rng: Source of randomness; the scene is a function of its state alone.
        max_objects: Upper bound of the number of objects, which is uniform from 1.
        word: A word that must be written in the scene.
        word_probability: How often some word is written when ``word`` is not given.

    Returns:
        The scene.
    """
    if word is None and rng.random() < word_probability:
        word = WORDS[rng.integers(len(WORDS))]
    background = _sample_background(rng)
    free = np.ones((GRID, GRID), dtype=bool)
    written = None
    if word is not None:
        row, col = int(rng.integers(GRID)), int(rng.integers(GRID - 1))
        free[row, col : col + 2] = False
        written = _place_word(rng, word, row, col, background)
    count = int(rng.integers(1, max_objects + 1))
    # Few shapes and colours in most scenes: otherwise "how many circles" would hardly ever be 3.
    shapes = rng.permutation(len(SHAPES))[: rng.integers(1, len(SHAPES) + 1)]
    colors = rng.permutation(len(COLORS))[: rng.integers(1, len(COLORS) + 1)]
    cells = rng.permutation(np.flatnonzero(free))[:count]
    objects = tuple(
        _place_object(
            rng,
            shape=SHAPES[rng.choice(shapes)],
            color=tuple(COLORS)[rng.choice(colors)],
            cell=divmod(int(cell), GRID),
        )
        for cell in cells
    )
    return Scene(objects=objects, word=written, background=background)


def _place_object(
    rng: np.random.Generator, *, shape: str, color: str, cell: tuple[int, int]
) -> SceneObject:
    size = SIZES[rng.integers(len(SIZES))]
    radius = float(rng.uniform(*_RADIUS[size]))
    slack = CELL / 2 - radius - 0.5
    offset_x, offset_y = rng.uniform(-slack, slack, size=2)
    rgb = np.clip(np.asarray(COLORS[color]) + rng.integers(-14, 15, size=3), 0, 255)
    return SceneObject(
        shape=shape,
        color=color,
        size=size,
        row=cell[0],
        col=cell[1],
        x=(cell[1] + 0.5) * CELL + float(offset_x),
        y=(cell[0] + 0.5) * CELL + float(offset_y),
        radius=radius,
        angle=float(rng.uniform(-0.3, 0.3)),
        rgb=(int(rgb[0]), int(rgb[1]), int(rgb[2])),
    )


def _place_word(
    rng: np.random.Generator, text: str, row: int, col: int, background: Background
) -> WrittenWord:
    width, height = _word_size(text)
    dark = sum(background.start) + sum(background.end) > 3 * 256
    ink = int(rng.integers(0, 40)) if dark else int(rng.integers(225, 256))
    return WrittenWord(
        text=text,
        row=row,
        col=col,
        x=col * CELL + _TEXT_STEP * int(rng.integers(0, (2 * CELL - width) // _TEXT_STEP + 1)),
        y=row * CELL + _TEXT_STEP * int(rng.integers(0, (CELL - height) // _TEXT_STEP + 1)),
        ink=(ink, ink, ink),
    )


def _sample_background(rng: np.random.Generator) -> Background:
    # Tones are nearly grey, and either light or dark: every object colour stands out on them.
    level = rng.uniform(170, 235) if rng.random() < 0.7 else rng.uniform(20, 70)
    tint = rng.uniform(-10, 10, size=3)
    other = level + rng.uniform(-25, 25)
    start, end = (np.clip(tone + tint, 0, 255).astype(int) for tone in (level, other))
    style: Style = ("plain", "gradient", "noisy")[rng.integers(3)]
    return Background(
        style=style,
        start=(int(start[0]), int(start[1]), int(start[2])),
        end=(int(end[0]), int(end[1]), int(end[2])),
        angle=float(rng.uniform(0, 2 * math.pi)),
        noise_seed=int(rng.integers(2**31)),
    )


def render(scene: Scene) -> Image.Image:
    """Draws a scene on a ``CANVAS`` x ``CANVAS`` RGB image."""
    image = _paint_background(scene.background)
    for thing in scene.objects:
        image.paste(Image.new("RGB", image.size, thing.rgb), mask=_object_mask(thing))
    if scene.word is not None:
        image.paste(Image.new("RGB", image.size, scene.word.ink), mask=_word_mask(scene.word))
    return image


def _paint_background(background: Background) -> Image.Image:
    start = np.asarray(background.start, dtype=np.float64)
    if background.style == "plain":
        return Image.new("RGB", (CANVAS, CANVAS), background.start)
    if background.style == "gradient":
        axis = np.linspace(-0.5, 0.5, CANVAS)
        ramp = (
            math.cos(background.angle) * axis[None, :] + math.sin(background.angle) * axis[:, None]
        )
        end = np.asarray(background.end, dtype=np.float64)
        pixels = start + (np.clip(ramp + 0.5, 0, 1)[..., None]) * (end - start)
    else:
        rng = np.random.default_rng(background.noise_seed)
        grain = rng.standard_normal(size=(CANVAS, CANVAS, 1), dtype=np.float64)
        pixels = start + 9 * grain
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _object_mask(thing: SceneObject) -> Image.Image:
    scale = _SUPERSAMPLING
    mask = Image.new("L", (CANVAS * scale, CANVAS * scale), 0)
    draw = ImageDraw.Draw(mask)
    x, y, radius = thing.x * scale, thing.y * scale, thing.radius * scale
    if thing.shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    else:
        draw.polygon([(x + radius * dx, y + radius * dy) for dx, dy in _outline(thing)], fill=255)
    return mask.reduce(scale)


def _outline(thing: SceneObject) -> list[tuple[float, float]]:
    """Corners of a polygon on (a star: on and in) the unit circle, first corner pointing up."""
    corners = {"triangle": 3, "square": 4, "star": 10}[thing.shape]
    turn = thing.angle + (math.pi / 4 if thing.shape == "square" else 0.0)
    points = []
    for corner in range(corners):
        reach = 0.45 if thing.shape == "star" and corner % 2 else 1.0
        angle = turn + 2 * math.pi * corner / corners
        points.append((reach * math.sin(angle), -reach * math.cos(angle)))
    return points


def _word_size(text: str) -> tuple[int, int]:
    left, top, right, bottom = _LETTERS.getbbox(text)
    return int(right - left) * _LETTER_SCALE, int(bottom - top) * _LETTER_SCALE


def _word_mask(word: WrittenWord) -> Image.Image:
    width, height = _word_size(word.text)
    letters = Image.new("L", (width // _LETTER_SCALE, height // _LETTER_SCALE), 0)
    ImageDraw.Draw(letters).text((0, 0), word.text, fill=255, font=_LETTERS)
    mask = Image.new("L", (CANVAS, CANVAS), 0)
    mask.paste(letters.resize((width, height), Image.Resampling.NEAREST), (word.x, word.y))
    return mask


def object_coverage(thing: SceneObject) -> NDArray[np.float32]:
    """Share of every patch that an object covers, as a ``(PATCH_GRID, PATCH_GRID)`` array."""
    return _per_patch(_object_mask(thing))


def word_coverage(word: WrittenWord) -> NDArray[np.float32]:
    """Share of every patch that lies in the word's box (its ink alone covers too little)."""
    width, height = _word_size(word.text)
    mask = Image.new("L", (CANVAS, CANVAS), 0)
    mask.paste(255, (word.x, word.y, word.x + width, word.y + height))
    return _per_patch(mask)


def _per_patch(mask: Image.Image) -> NDArray[np.float32]:
    pixels = np.asarray(mask, dtype=np.float32) / 255
    side = CANVAS // PATCH_GRID
    return pixels.reshape(PATCH_GRID, side, PATCH_GRID, side).mean(axis=(1, 3))
