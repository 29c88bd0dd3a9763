"""The question grammar: what can be asked about a scene, and the one right answer.

Eight kinds of question, each with a few forms. A form has a closed set of answers, and
:func:`generate_examples` draws the form and the answer before it looks for a scene that has them:
answers are balanced inside every form, which keeps a model that does not look at the picture near
chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from PIL import Image

from pocketvlm.reference.scenes import (
    COLORS,
    SHAPES,
    SIZES,
    WORDS,
    Scene,
    SceneObject,
    render,
    sample_scene,
)

__all__ = [
    "FORMS",
    "QUESTION_KINDS",
    "SPLIT_KEYS",
    "Example",
    "Form",
    "Question",
    "Split",
    "draw_example",
    "generate_examples",
    "make_examples",
    "questions_about",
    "sample_example_scene",
]

Split = Literal["train", "calibration", "evaluation"]
PictureT = TypeVar("PictureT")
SPLIT_KEYS: dict[Split, int] = {"train": 1, "calibration": 2, "evaluation": 3}

QUESTION_KINDS: tuple[str, ...] = (
    "existence", "count", "color", "shape", "size", "position", "relation", "word",
)  # fmt: skip

_QUADRANTS = ("top left", "top right", "bottom left", "bottom right")


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to ask, with the answers it can have."""

    kind: str
    name: str
    answers: tuple[str, ...]


FORMS: tuple[Form, ...] = (
    Form(kind="existence", name="color and shape", answers=("yes", "no")),
    Form(kind="existence", name="shape", answers=("yes", "no")),
    Form(kind="count", name="all", answers=("1", "2", "3", "4")),
    Form(kind="count", name="shape", answers=("0", "1", "2", "3")),
    Form(kind="count", name="color", answers=("0", "1", "2", "3")),
    Form(kind="color", name="shape", answers=tuple(COLORS)),
    Form(kind="color", name="size and shape", answers=tuple(COLORS)),
    Form(kind="shape", name="color", answers=SHAPES),
    Form(kind="shape", name="size and color", answers=SHAPES),
    Form(kind="size", name="color and shape", answers=SIZES),
    Form(kind="size", name="shape", answers=SIZES),
    Form(kind="position", name="color and shape", answers=_QUADRANTS),
    Form(kind="position", name="shape", answers=_QUADRANTS),
    Form(kind="relation", name="left or right", answers=("left", "right")),
    Form(kind="relation", name="above or below", answers=("above", "below")),
    Form(kind="word", name="word", answers=WORDS),
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about one scene, with its answer."""

    form: Form
    text: str
    answer: str

    @property
    def kind(self) -> str:
        """The kind of the question's form."""
        return self.form.kind


@dataclass(frozen=True, kw_only=True)
class Example:
    """A picture, one question about it and the expected answer."""

    image: Image.Image
    question: str
    answer: str
    kind: str


def generate_examples(seed: int, n: int, *, split: Split = "evaluation") -> Iterator[Example]:
    """Generates balanced question-answer examples, one scene each.

    Example ``i`` depends on ``(split, seed, i)`` alone, so a longer run starts with a shorter one.
    The split is part of every random key: no two splits can share a scene, whatever their seeds.

    Args:
        seed: Non-negative seed of this run.
        n: How many examples.
        split: Which of the disjoint seed spaces to draw from.

    Yields:
        Examples whose kinds follow each other round-robin in the order of ``QUESTION_KINDS``.

    Raises:
        ValueError: If the split is unknown, or ``seed`` or ``n`` is negative.
    """
    return make_examples(sample_example_scene, render, seed, n, split)


def sample_example_scene(seed: int, index: int, *, split: Split) -> tuple[Scene, Question]:
    """Draws the scene and the question of example ``index``, without rendering.

    The form and its answer are drawn first, then scenes until one of them has such a question.
    """
    rng = np.random.default_rng((SPLIT_KEYS[split], seed, index))

    def sample(word: str | None) -> Scene:
        return sample_scene(rng, word=word)

    return draw_example(rng, index, sample, lambda scene: scene)


def make_examples(
    draw: Callable[..., tuple[PictureT, Question]],
    draw_pixels: Callable[[PictureT], Image.Image],
    seed: int,
    n: int,
    split: Split,
) -> Iterator[Example]:
    """What `generate_examples` promises, for any kind of picture.

    Args:
        draw: Draws picture and question of an example, from a seed, an index and a split.
        draw_pixels: Renders a picture.
        seed: As there.
        n: Likewise.
        split: Likewise.
    """
    if split not in SPLIT_KEYS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLIT_KEYS)}")
    if seed < 0 or n < 0:
        raise ValueError(f"seed and n must not be negative, got seed={seed}, n={n}")
    for index in range(n):
        picture, question = draw(seed, index, split=split)
        yield Example(
            image=draw_pixels(picture),
            question=question.text,
            answer=question.answer,
            kind=question.kind,
        )


def draw_example(
    rng: np.random.Generator,
    index: int,
    sample: Callable[[str | None], PictureT],
    scene_of: Callable[[PictureT], Scene],
) -> tuple[PictureT, Question]:
    """Draws a form and its answer, then pictures until one of them has such a question.

    Args:
        rng: Source of randomness.
        index: The example's, which decides its kind of question.
        sample: Draws a picture, in which a given word is written.
        scene_of: What a picture shows, for questions.
    """
    kind = QUESTION_KINDS[index % len(QUESTION_KINDS)]
    forms = [form for form in FORMS if form.kind == kind]
    form = forms[rng.integers(len(forms))]
    answer = form.answers[rng.integers(len(form.answers))]
    while True:
        picture = sample(answer if kind == "word" else None)
        matching = [q for q in questions_about(scene_of(picture), form) if q.answer == answer]
        if matching:
            return picture, matching[rng.integers(len(matching))]


def questions_about(scene: Scene, form: Form) -> list[Question]:
    """Lists every well-posed question of one form about a scene.

    A question that refers to "the square" is well posed when there is exactly one.
    """
    pairs = _ASKERS[form.kind](scene, form.name)
    return [Question(form=form, text=text, answer=answer) for text, answer in pairs]


def _unique(scene: Scene, *attributes: str) -> list[tuple[SceneObject, str]]:
    """Objects that the given attributes single out, each with its phrase such as "red circle"."""
    phrases = [
        (thing, " ".join(str(getattr(thing, name)) for name in attributes))
        for thing in scene.objects
    ]
    texts = [phrase for _, phrase in phrases]
    return [(thing, phrase) for thing, phrase in phrases if texts.count(phrase) == 1]


def _existence(scene: Scene, name: str) -> list[tuple[str, str]]:
    shapes = {thing.shape for thing in scene.objects}
    if name == "shape":
        return [(f"is there a {shape}?", _yes_no(shape in shapes)) for shape in SHAPES]
    colors = {thing.color for thing in scene.objects}
    present = {(thing.color, thing.shape) for thing in scene.objects}
    # A "no" shares its colour or its shape with something present: half the answer is not enough.
    return [
        (
            f"is there a {color} {shape}?".replace("a orange", "an orange"),
            _yes_no((color, shape) in present),
        )
        for color in COLORS
        for shape in SHAPES
        if color in colors or shape in shapes
    ]


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"


def _count(scene: Scene, name: str) -> list[tuple[str, str]]:
    if name == "all":
        return [("how many objects are there?", str(len(scene.objects)))]
    if name == "shape":
        shapes = [thing.shape for thing in scene.objects]
        return [(f"how many {shape}s are there?", str(shapes.count(shape))) for shape in SHAPES]
    colors = [thing.color for thing in scene.objects]
    return [(f"how many {color} objects are there?", str(colors.count(color))) for color in COLORS]


def _color(scene: Scene, name: str) -> list[tuple[str, str]]:
    attributes = ("shape",) if name == "shape" else ("size", "shape")
    return [(f"what color is the {it}?", thing.color) for thing, it in _unique(scene, *attributes)]


def _shape(scene: Scene, name: str) -> list[tuple[str, str]]:
    attributes = ("color",) if name == "color" else ("size", "color")
    return [
        (f"what shape is the {it} object?", thing.shape)
        for thing, it in _unique(scene, *attributes)
    ]


def _size(scene: Scene, name: str) -> list[tuple[str, str]]:
    attributes = ("shape",) if name == "shape" else ("color", "shape")
    return [
        (f"is the {it} small or large?", thing.size) for thing, it in _unique(scene, *attributes)
    ]


def _position(scene: Scene, name: str) -> list[tuple[str, str]]:
    attributes = ("shape",) if name == "shape" else ("color", "shape")
    return [(f"where is the {it}?", _quadrant(thing)) for thing, it in _unique(scene, *attributes)]


def _quadrant(thing: SceneObject) -> str:
    return f"{'top' if thing.row < 2 else 'bottom'} {'left' if thing.col < 2 else 'right'}"


def _relation(scene: Scene, name: str) -> list[tuple[str, str]]:
    things = _unique(scene, "color", "shape")
    pairs = [(first, second) for first in things for second in things if first[0] is not second[0]]
    if name == "left or right":
        return [
            (f"is the {one} left or right of the {two}?", "left" if a.col < b.col else "right")
            for (a, one), (b, two) in pairs
            if a.col != b.col
        ]
    return [
        (f"is the {one} above or below the {two}?", "above" if a.row < b.row else "below")
        for (a, one), (b, two) in pairs
        if a.row != b.row
    ]


def _word(scene: Scene, name: str) -> list[tuple[str, str]]:
    del name  # there is one form
    return [] if scene.word is None else [("what word is written?", scene.word.text)]


_ASKERS = {
    "existence": _existence,
    "count": _count,
    "color": _color,
    "shape": _shape,
    "size": _size,
    "position": _position,
    "relation": _relation,
    "word": _word,
}
