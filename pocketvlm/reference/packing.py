"""Many questions about one scene in a single training sequence.

The image is by far the longest part of a prompt. A pack holds it once, followed by as many turns
as fit; a block-diagonal mask lets every turn see the image and itself, and positions restart after
the image, so each turn is exactly the single-question problem at a tenth of its cost. Some segments
hold two turns in a row, which is how the models learn that a chat continues.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from pocketvlm.reference.architecture import VISUAL_TOKENS
from pocketvlm.reference.questions import FORMS, QUESTION_KINDS, Question, questions_about
from pocketvlm.reference.scenes import Scene
from pocketvlm.reference.tokenizer import (
    BOS_ID,
    DIALECTS,
    EOS_ID,
    IMAGE_ID,
    PAD_ID,
    build_tokenizer,
)

__all__ = [
    "IGNORED",
    "PACK_LENGTH",
    "Pack",
    "choose_questions",
    "image_span",
    "pack_questions",
    "picture_prefix",
]

PACK_LENGTH = 256
IGNORED = -100
_TWO_TURNS = 0.15
# The kinds that must find one object among several and read another of its attributes learn last.
_KIND_WEIGHTS = {
    "existence": 1.0, "count": 1.2, "color": 1.2, "shape": 1.2,
    "size": 1.0, "position": 1.0, "relation": 1.8, "word": 0.5,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One training sequence; every array is as long.

    Attributes:
        tokens: Token ids, the image placeholders included.
        targets: The next token where it belongs to an answer, ``IGNORED`` elsewhere.
        segments: 0 for the image prefix, then one number per independent chat; -1 for padding.
        positions: Position ids, which restart after the prefix in every segment.
    """

    tokens: NDArray[np.int16]
    targets: NDArray[np.int16]
    segments: NDArray[np.int16]
    positions: NDArray[np.int16]


@lru_cache(maxsize=100_000)
def _encode(dialect: str, text: str) -> tuple[int, ...]:
    return tuple(_tokenizer(dialect)(text)["input_ids"])


@lru_cache(maxsize=3)
def _tokenizer(dialect: str) -> PreTrainedTokenizerFast:
    return build_tokenizer(dialect)


@lru_cache(maxsize=2)
def _prefix(dialect: str) -> tuple[int, ...]:
    before, after = DIALECTS[dialect].placeholder
    return (
        BOS_ID,
        *_encode(dialect, DIALECTS[dialect].header + before),
        *[IMAGE_ID] * VISUAL_TOKENS,
        *_encode(dialect, after),
    )


def picture_prefix(dialect: str, picture: str) -> tuple[int, ...]:
    """A prompt to the end of its picture, whose text is given."""
    return (BOS_ID, *_encode(dialect, DIALECTS[dialect].header + picture))


def image_span(dialect: str) -> slice:
    """Where the visual tokens are in every pack of a dialect."""
    start = _prefix(dialect).index(IMAGE_ID)
    return slice(start, start + VISUAL_TOKENS)


def choose_questions(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """Draws up to ``count`` different questions about a scene, kinds and answers balanced."""
    options: dict[str, dict[str, dict[str, list[Question]]]] = {}
    for form in FORMS:
        for question in questions_about(scene, form):
            by_form = options.setdefault(form.kind, {}).setdefault(form.name, {})
            by_form.setdefault(question.answer, []).append(question)
    chosen: dict[str, Question] = {}
    kinds = [kind for kind in QUESTION_KINDS if kind in options]
    weights = np.array([_KIND_WEIGHTS[kind] for kind in kinds])
    for kind_index in rng.choice(len(kinds), size=2 * count, p=weights / weights.sum()):
        forms = list(options[kinds[kind_index]].values())
        answers = list(forms[rng.integers(len(forms))].values())
        candidates = answers[rng.integers(len(answers))]
        question = candidates[rng.integers(len(candidates))]
        chosen.setdefault(question.text, question)
        if len(chosen) == count:
            break
    return list(chosen.values())


def pack_questions(
    questions: list[Question],
    rng: np.random.Generator,
    dialect: str,
    prefix: tuple[int, ...] | None = None,
    length: int = PACK_LENGTH,
) -> Pack:
    """Packs questions about one picture into a sequence; those that do not fit are left out.

    Args:
        questions: The questions.
        rng: Decides where a turn follows another.
        dialect: How a chat is written.
        prefix: The prompt to the end of the picture; `None` for that of one scene.
        length: Tokens of the sequence.
    """
    prefix = _prefix(dialect) if prefix is None else prefix
    tokens = np.full(length, PAD_ID, dtype=np.int16)
    targets = np.full(length, IGNORED, dtype=np.int16)
    segments = np.full(length, -1, dtype=np.int16)
    positions = np.zeros(length, dtype=np.int16)
    tokens[: len(prefix)] = prefix
    segments[: len(prefix)] = 0
    positions[: len(prefix)] = np.arange(len(prefix))
    end, segment, position = len(prefix), 0, len(prefix)
    for question in questions:
        follows = segment > 0 and rng.random() < _TWO_TURNS
        header = _encode(dialect, DIALECTS[dialect].header) if follows else ()
        asked = (
            *header,
            *_encode(dialect, question.text),
            *_encode(dialect, DIALECTS[dialect].reply),
        )
        answer = (*_encode(dialect, question.answer), EOS_ID)
        added = len(asked) + len(answer)
        if end + added > length:
            break
        if not follows:
            segment, position = segment + 1, len(prefix)
        tokens[end : end + added] = (*asked, *answer)
        targets[end + len(asked) - 1 : end + added - 1] = answer
        segments[end : end + added] = segment
        positions[end : end + added] = np.arange(position, position + added)
        end, position = end + added, position + added
    return Pack(tokens=tokens, targets=targets, segments=segments, positions=positions)
