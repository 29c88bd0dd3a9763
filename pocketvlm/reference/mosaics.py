"""Mosaics: pictures of several scenes, too large to be read as a whole.

A mosaic is a grid of scenes of the size of a tile. A tower that sees it tile by tile sees scenes as
it knows them; seen as a whole, at half the size, words and shapes are too small for it. Questions
are those of `pocketvlm.reference.questions`, asked about the mosaic as one large scene: what is
referred to is the only one of its kind in all of it, and "top left" is that of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from pocketvlm.reference import Pictures
from pocketvlm.reference.questions import (
    SPLIT_KEYS,
    Example,
    Question,
    Split,
    draw_example,
    generate_examples,
    make_examples,
)
from pocketvlm.reference.scenes import CANVAS, GRID, MAX_OBJECTS, Scene, render, sample_scene

__all__ = [
    "GENERATORS",
    "Mosaic",
    "generate_mosaic_examples",
    "render_mosaic",
    "sample_mosaic_example",
]

_GRIDS = ((2, 2), (2, 2), (1, 2), (2, 1))
"""Rows and columns, drawn alike often."""
_STREAM = 2  # keeps mosaics apart from the scenes of the same seed
_WORD_PROBABILITY = 0.4


@dataclass(frozen=True, kw_only=True)
class Mosaic:
    """Scenes in a grid.

    Attributes:
        scenes: Row by row.
        columns: Scenes per row.
    """

    scenes: tuple[Scene, ...]
    columns: int

    @property
    def rows(self) -> int:
        """Rows of scenes."""
        return len(self.scenes) // self.columns

    @property
    def whole(self) -> Scene:
        """The mosaic as one scene, its objects in the cells of the whole picture."""
        objects, words = [], []
        for index, scene in enumerate(self.scenes):
            row, column = divmod(index, self.columns)
            objects += [
                replace(
                    thing,
                    row=(row * GRID + thing.row) // self.rows,
                    col=(column * GRID + thing.col) // self.columns,
                )
                for thing in scene.objects
            ]
            if scene.word is not None:
                words.append(scene.word)
        background = self.scenes[0].background
        return Scene(
            objects=tuple(objects), word=words[0] if words else None, background=background
        )


def render_mosaic(mosaic: Mosaic) -> Image.Image:
    """Draws a mosaic, each scene at the size of a tile."""
    picture = Image.new("RGB", (CANVAS * mosaic.columns, CANVAS * mosaic.rows))
    for index, scene in enumerate(mosaic.scenes):
        row, column = divmod(index, mosaic.columns)
        picture.paste(render(scene), (column * CANVAS, row * CANVAS))
    return picture


def sample_mosaic_example(seed: int, index: int, *, split: Split) -> tuple[Mosaic, Question]:
    """Draws the mosaic and the question of example `index`, without rendering.

    The form and its answer are drawn first, then mosaics until one of them has such a question.
    """
    rng = np.random.default_rng((_STREAM, SPLIT_KEYS[split], seed, index))

    def sample(word: str | None) -> Mosaic:
        return _sample_mosaic(rng, word=word)

    return draw_example(rng, index, sample, lambda mosaic: mosaic.whole)


def generate_mosaic_examples(
    seed: int, n: int, *, split: Split = "evaluation"
) -> Iterator[Example]:
    """Generates balanced question-answer examples, one mosaic each.

    Example `i` depends on `(split, seed, i)` alone, so a longer run starts with a shorter one.

    Args:
        seed: Non-negative seed of this run.
        n: How many examples.
        split: Which of the disjoint seed spaces to draw from.

    Yields:
        Examples whose kinds follow each other round-robin in the order of `QUESTION_KINDS`.

    Raises:
        ValueError: If the split is unknown, or `seed` or `n` is negative.
    """
    return make_examples(sample_mosaic_example, render_mosaic, seed, n, split)


GENERATORS: Mapping[Pictures, Callable[..., Iterator[Example]]] = {
    "reference": generate_examples,
    "mosaics": generate_mosaic_examples,
}
"""Generators of examples, which take a seed, a number and a split."""


def _sample_mosaic(rng: np.random.Generator, *, word: str | None) -> Mosaic:
    """Draws a mosaic with one to four objects, and a word in one scene at most."""
    rows, columns = _GRIDS[rng.integers(len(_GRIDS))]
    count = rows * columns
    has_word = word is not None or rng.random() < _WORD_PROBABILITY
    written = int(rng.integers(count)) if has_word else -1
    wanted = np.bincount(
        rng.integers(count, size=int(rng.integers(1, MAX_OBJECTS + 1))), minlength=count
    )
    scenes = []
    for index in range(count):
        scene = _sample_scene(rng, int(wanted[index]), word, is_written=index == written)
        scenes.append(scene)
    return Mosaic(scenes=tuple(scenes), columns=columns)


def _sample_scene(
    rng: np.random.Generator, objects: int, word: str | None, *, is_written: bool
) -> Scene:
    while True:
        scene = sample_scene(
            rng,
            word=word if is_written else None,
            word_probability=1.0 if is_written else 0.0,
        )
        if len(scene.objects) >= objects:
            return replace(scene, objects=scene.objects[:objects])
