"""Prompts of samples as token ids, for checkpoints and bundles.

All prompts are encoded and checked before the first is answered, so that an invalid row ends the
evaluation at its start, with file and line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pocketvlm.errors import CalibrationError, PocketVLMError, join_problems
from pocketvlm.models.images.cutting import PictureCutter
from pocketvlm.models.images.tilings import TileGrid
from pocketvlm.prompt.messages import Message

if TYPE_CHECKING:
    from pocketvlm.calibration.source import Sample

__all__ = [
    "PromptLimits",
    "Question",
    "answer_problem",
    "encode_questions",
    "prompt_messages",
    "require_fitting",
]

Encode = Callable[[list[Message], list[TileGrid]], list[int]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question as a model takes it.

    Attributes:
        token_ids: The prompt, its pictures as all their placeholders.
        grids: How its pictures are cut, in their order.
    """

    token_ids: list[int]
    grids: list[TileGrid]


@dataclass(frozen=True, kw_only=True)
class PromptLimits:
    """The limits of a prompt and its answer.

    Attributes:
        image_token_id: The placeholder.
        placeholders: Placeholders of one tile, N.
        kept: Rows of one tile, k, or of a tile on average where they differ.
        keeps_positions: Whether a tile takes N positions; k of them otherwise.
        vocabulary: Rows of the token table.
        positions: Positions that the model may use.
        rows: Rows of KV cache; `None` if they are not a separate limit.
        kept_of_whole: Rows of the whole picture beside its tiles; `None` for as many as of a tile.
    """

    image_token_id: int
    placeholders: int
    kept: int
    keeps_positions: bool
    vocabulary: int
    positions: int
    rows: int | None = None
    kept_of_whole: int | None = None

    def rows_of(self, question: Question) -> int:
        """Rows of KV cache that a question takes, at most."""
        dropped = sum(
            grid.placeholders(self.placeholders)
            - grid.most_rows(self.placeholders, self.kept, self.kept_of_whole)
            for grid in question.grids
        )
        return len(question.token_ids) - dropped

    def problem(self, question: Question, max_new_tokens: int) -> str | None:
        """Why a question cannot be answered, or `None`."""
        grids = question.grids
        found = question.token_ids.count(self.image_token_id)
        needed = sum(grid.placeholders(self.placeholders) for grid in grids)
        if found != needed:
            return (
                f"its prompt has {found} image placeholders where {len(grids)} pictures need "
                f"{needed}: the chat template leaves pictures out, or text becomes a placeholder"
            )
        return self.room_problem(question, max_new_tokens)

    def room_problem(self, question: Question, max_new_tokens: int) -> str | None:
        """Why a question, whose placeholders are right, has no place in the model, or `None`."""
        token_ids = question.token_ids
        unknown = next((token for token in token_ids if token >= self.vocabulary), None)
        if unknown is not None:
            return f"token {unknown} is beyond the model's table of {self.vocabulary} rows"
        rows = self.rows_of(question)
        taken = len(token_ids) if self.keeps_positions else rows
        # The last token of an answer is not run.
        if taken + max_new_tokens - 1 > self.positions:
            return (
                f"the question takes {taken:,} positions and its answer up to {max_new_tokens}; "
                f"the context has {self.positions:,}"
            )
        if self.rows is not None and rows + max_new_tokens - 1 > self.rows:
            return (
                f"the question takes {rows:,} rows of KV cache and its answer up to "
                f"{max_new_tokens}; the runtime has {self.rows:,}"
            )
        return None


def prompt_messages(sample: Sample) -> list[Message]:
    """The conversation up to the question, with pictures in the positions of the data."""
    return sample.messages()


def answer_problem(sample: Sample) -> str | None:
    """Why a sample's answer cannot be scored against, or `None`."""
    return None if sample.answer.strip() else "its answer is empty; a scored question needs one"


def encode_questions(
    encode: Encode,
    cutter: PictureCutter,
    samples: Sequence[Sample],
    limits: PromptLimits,
    *,
    max_new_tokens: int,
) -> list[Question]:
    """All samples as a model takes them.

    Args:
        encode: From messages and the tiles of their pictures to token ids.
        cutter: What cuts large pictures.
        samples: Questions.
        limits: The limits of prompts.
        max_new_tokens: Longest answer.

    Raises:
        CalibrationError: A row cannot be asked: the chat template refuses it, it is too long, or
            it has a token that the model does not know.
    """
    questions: list[Question] = []
    problems: list[str] = []
    for sample in samples:
        problem: str | None
        try:
            grids = sample.grids(cutter)
            ids = encode(prompt_messages(sample), grids)
            questions.append(Question(token_ids=ids, grids=grids))
            problem = limits.problem(questions[-1], max_new_tokens)
            problem = problem or answer_problem(sample)
        except CalibrationError as error:  # says where itself
            problems.append(str(error))
            problem = None
        except PocketVLMError as error:
            problem = str(error)
        problems += [] if problem is None else [f"{sample.where}: {problem}"]
    if problems:
        raise CalibrationError(join_problems(problems))
    return questions


def require_fitting(
    questions: Sequence[Question],
    samples: Sequence[Sample],
    limits: PromptLimits,
    *,
    max_new_tokens: int,
) -> None:
    """Checks questions of `encode_questions` against other limits, such as an engine's.

    Raises:
        CalibrationError: One does not fit.
    """
    problems = [
        f"{sample.where}: {problem}"
        for question, sample in zip(questions, samples, strict=True)
        if (problem := limits.room_problem(question, max_new_tokens))
    ]
    if problems:
        raise CalibrationError(join_problems(problems))
