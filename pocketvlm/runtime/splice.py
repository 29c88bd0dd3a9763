"""Where every row of the decoder's input comes from, and which rotary position it has.

The numpy twin of `forward.embed_prompts`. A prompt's run of N placeholders becomes the k rows that
the vision graph returned. Under `original` positions these keep the places they had among the N,
so the text after the picture starts where it would have started without reduction; under
`consecutive` everything is renumbered. Models that number pictures along several axes
(`bundle.positions`) always keep them.

Rows are described before they are embedded, so that a second turn can see which of them the KV
cache holds already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pocketvlm.bundle import MutualRows, PositionGrid
from pocketvlm.errors import InputError

__all__ = [
    "PromptLayout",
    "VisualFeatures",
    "embed_rows",
    "image_runs",
    "lay_out_prompt",
    "whole_rows",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class VisualFeatures:
    """The rows that stand for one run of placeholders: a picture, or one tile of it.

    Attributes:
        embeds: float32 [1, k, width].
        indices: int64 [1, k]: which of the N unreduced tokens these are, ascending.
        placeholders: Length of the run, N.
        grid: The N tokens where positions have three axes; `None` where they have one.
        serial: Tells this picture from every other one of the conversation.
    """

    embeds: npt.NDArray[np.float32]
    indices: npt.NDArray[np.int64]
    placeholders: int
    grid: PositionGrid | None = None
    serial: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptLayout:
    """The rows of a prompt, in order.

    Attributes:
        codes: int64 [rows]: the token id of a text row, `-1 - serial` of a visual one.
        slots: int64 [rows]: which of its picture's k embeddings a visual row takes; 0 for text.
        positions: int64 [axes, rows]: rotary positions, on one axis or on three.
        next_position: Rotary position of the first generated token.
    """

    codes: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    next_position: int

    def mutual(self, kind: MutualRows | None) -> npt.NDArray[np.int64] | None:
        """Numbers of rows that see each other, int64 [rows], -1 for the others.

        Args:
            kind: Which rows do; `None` where none do.
        """
        if kind is None:
            return None
        if kind == "prompt":
            return np.zeros(len(self.codes), np.int64)
        return np.where(self.codes < 0, -1 - self.codes, -1)

    def whole_start(self, start: int, kind: MutualRows | None) -> int:
        """The last row up to `start` that a call may begin with: rows that see each other stay."""
        numbers = self.mutual(kind)
        return start if numbers is None else whole_rows(numbers, start)

    @property
    def is_visual(self) -> npt.NDArray[np.bool_]:
        """Which rows come from a picture, bool [rows]."""
        return self.codes < 0

    def shared_rows(self, other: PromptLayout) -> int:
        """Rows at the start that both layouts have in common, and with them their KV cache."""
        rows = min(len(self.codes), len(other.codes))
        equal = (
            (self.codes[:rows] == other.codes[:rows])
            & (self.slots[:rows] == other.slots[:rows])
            & (self.positions[:, :rows] == other.positions[:, :rows]).all(axis=0)
        )
        return rows if equal.all() else int(equal.argmin())

    def extended(self, token_ids: Sequence[int]) -> PromptLayout:
        """The layout with generated tokens after it."""
        count = len(token_ids)
        following = np.tile(self.next_position + np.arange(count), (len(self.positions), 1))
        return PromptLayout(
            codes=np.append(self.codes, np.asarray(token_ids, np.int64)),
            slots=np.append(self.slots, np.zeros(count, np.int64)),
            positions=np.concatenate([self.positions, following], axis=1),
            next_position=self.next_position + count,
        )

    def first(self, rows: int) -> PromptLayout:
        """The first rows alone; generation cannot continue from there unless these are all."""
        return PromptLayout(
            codes=self.codes[:rows],
            slots=self.slots[:rows],
            positions=self.positions[:, :rows],
            next_position=self.next_position,
        )


def whole_rows(mutual: npt.NDArray[np.int64], count: int) -> int:
    """The most rows up to `count` after which no row sees one before, by their numbers [rows]."""
    while 0 < count < len(mutual) and 0 <= mutual[count] == mutual[count - 1]:
        count -= 1
    return count


def image_runs(
    token_ids: Sequence[int], lengths: Sequence[int], *, image_token_id: int
) -> list[int]:
    """First columns of the runs of placeholders, one run per picture or tile.

    Args:
        token_ids: The prompt.
        lengths: Placeholders of each run.
        image_token_id: The placeholder.

    Raises:
        InputError: Placeholders and pictures do not match.
    """
    columns = np.flatnonzero(np.asarray(token_ids, np.int64) == image_token_id)
    needed = sum(lengths)
    first = np.cumsum([0, *lengths])[:-1]
    if len(columns) == needed:
        # Neighbouring runs are told apart by their lengths alone.
        gaps = np.flatnonzero(np.diff(columns) > 1) + 1
        if np.isin(gaps, first).all():
            return columns[first].tolist()
    raise InputError(
        f"the prompt has {len(columns)} image placeholders where its pictures need {needed} in "
        f"{len(lengths)} runs"
    )


def lay_out_prompt(
    token_ids: Sequence[int],
    pictures: Sequence[VisualFeatures],
    *,
    image_token_id: int,
    keeps_positions: bool,
    axes: int = 1,
) -> PromptLayout:
    """Lays out a prompt whose pictures are runs of all their placeholders.

    Args:
        token_ids: The prompt.
        pictures: Features of its pictures, in order.
        image_token_id: The placeholder.
        keeps_positions: Whether the policy is `original`.
        axes: Axes along which rows are numbered, one or three.

    Raises:
        InputError: Placeholders and pictures do not match.
    """
    ids = np.asarray(token_ids, np.int64)
    lengths = [picture.placeholders for picture in pictures]
    runs = image_runs(token_ids, lengths, image_token_id=image_token_id)
    codes: list[npt.NDArray[np.int64]] = []
    slots: list[npt.NDArray[np.int64]] = []
    positions: list[npt.NDArray[np.int64]] = []
    column, position = 0, 0

    def add_text(end: int) -> int:
        count = end - column
        codes.append(ids[column:end])
        slots.append(np.zeros(count, np.int64))
        positions.append(np.tile(position + np.arange(count), (axes, 1)))
        return position + count

    for run, picture in zip(runs, pictures, strict=True):
        position = add_text(run)
        kept = picture.embeds.shape[1]
        codes.append(np.full(kept, -1 - picture.serial))
        slots.append(np.arange(kept))
        if picture.grid is not None:
            positions.append(position + picture.grid.offsets(picture.indices[0]))
            position += picture.grid.advance
        elif keeps_positions:
            positions.append(position + picture.indices)
            position += picture.placeholders
        else:
            positions.append(position + np.arange(kept)[None])
            position += kept
        column = run + picture.placeholders
    position = add_text(len(ids))
    return PromptLayout(
        codes=np.concatenate(codes),
        slots=np.concatenate(slots),
        positions=np.concatenate(positions, axis=1),
        next_position=position,
    )


def embed_rows(
    layout: PromptLayout,
    pictures: Sequence[VisualFeatures],
    embed: Callable[[Sequence[int]], npt.NDArray[np.float32]],
    *,
    start: int = 0,
) -> npt.NDArray[np.float32]:
    """Embeddings of the rows from `start` on, float32 [1, rows - start, width].

    Args:
        layout: The prompt.
        pictures: Features of its pictures.
        embed: Token ids to embeddings [1, count, width].
        start: Rows before it are in the KV cache already.
    """
    codes, slots = layout.codes[start:], layout.slots[start:]
    is_text = codes >= 0
    if is_text.all():
        return embed(codes.tolist())
    width = pictures[0].embeds.shape[2]
    rows = np.empty((1, len(codes), width), np.float32)
    if is_text.any():
        rows[:, is_text] = embed(codes[is_text].tolist())
    for picture in pictures:
        own = codes == -1 - picture.serial
        rows[:, own] = picture.embeds[:, slots[own]]
    return rows
