"""Runner: what a conversation needs of an inference engine, whichever it is.

The ONNX runner is the first; one for ExecuTorch or Core ML implements the same five calls. Arrays
are numpy, batch 1; the KV cache lives inside the runner and grows by the rows of each `decode`.

Keys and values are cut back at any row by forgetting those after it. A layer that keeps a state
instead, such as the last inputs of a short convolution, has overwritten what was there before; its
runner copies its states after every call of several rows, which is where a turn's prompt ends, and
goes back to such places alone. Where a schedule drops visual rows by what the last row of their
call looks at, all that lies between a call's first visual row and its end depends on that row, so
that such rows go together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pocketvlm.bundle import VisualSchedule
from pocketvlm.errors import InputError

__all__ = ["PREFILL_PIECE_ROWS", "Runner", "States"]

PREFILL_PIECE_ROWS = 128
"""Rows of a long call that the ONNX runners run at once; the C++ one has the same number."""

States = Mapping[str, npt.NDArray[np.float32]]
"""What layers keep beside keys and values, by the names of a graph."""


class Runner(ABC):
    """One bundle, loaded into one engine, with room for one conversation.

    Attributes:
        capacity: Rows that the KV cache can hold.
        engine: What computes, in words; a certificate says it.
    """

    capacity: int
    engine: str = "not named"

    def __init__(self, *, capacity: int, schedule: VisualSchedule | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; a KV cache holds at least 1 row")
        self.capacity = capacity
        self._schedule = schedule
        self._length = 0
        # Whether a row counts in the caches of each stage: text, and as many visual rows as stay.
        stages = 0 if schedule is None else len(schedule.drops)
        self._counts = np.zeros((stages, capacity), np.bool_)
        self._is_visual = np.zeros(capacity, np.bool_)
        self._ranked: list[range] = []
        self._kept: dict[int, States] = {}

    @property
    def length(self) -> int:
        """Rows that the KV cache holds."""
        return self._length

    @property
    def stage_lengths(self) -> npt.NDArray[np.int64]:
        """Rows that the layers after each drop of the schedule hold, int64 [drops]."""
        return np.count_nonzero(self._counts[:, : self._length], axis=1).astype(np.int64)

    @abstractmethod
    def encode_image(
        self, pixels: npt.NDArray[np.float32], variant: str | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Pixels to visual tokens.

        Args:
            pixels: float32 [1, C, height, width].
            variant: The vision graph, by its name in the manifest; `None` for the first.

        Returns:
            Embeddings [1, k, width] and indices [1, k], both the caller's.

        Raises:
            BundleError: There is no such graph, or it cannot be run.
        """

    @abstractmethod
    def embed(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Token ids to embeddings [1, L, width]; may be overwritten by the next call."""

    @abstractmethod
    def decode(
        self,
        embeds: npt.NDArray[np.float32],
        position_ids: npt.NDArray[np.int64],
        is_visual: npt.NDArray[np.bool_] | None = None,
        mutual: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Runs L rows after those in the cache, which then holds them too.

        Args:
            embeds: float32 [1, L, width].
            position_ids: int64 [axes, L].
            is_visual: bool [L]: which rows come from a picture; `None` for none of them. Decoders
                that run every row through every layer do not ask.
            mutual: int64 [L]: rows with the same number see each other, -1 for rows that see the
                past alone; `None` for no others. All rows of a number come in one call. Decoders
                without such rows do not ask.

        Returns:
            Logits of the last row, float32 [vocabulary]; overwritten by the next call.

        Raises:
            InputError: The cache has no room for L more rows, or the last row is visual where
                visual rows are dropped on the way; the cache is left as it was.
        """

    def truncate(self, length: int) -> int:
        """Forgets every row from `length` on, at no cost.

        Returns:
            Rows that are left: fewer than `length` where layers keep states and none are known of
            this place, or between visual rows and the row that ranked them.

        Raises:
            ValueError: The cache holds fewer rows.
        """
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate to {length}: the cache holds {self._length} rows")
        length = next((ranked[0] for ranked in self._ranked if length in ranked[1:]), length)
        self._ranked = [ranked for ranked in self._ranked if ranked.stop <= length]
        states = self._states()
        if states and length < self._length:
            self._kept = {at: kept for at, kept in self._kept.items() if at <= length}
            length = max(self._kept, default=0)
            for name, state in states.items():
                state[...] = self._kept[length][name] if length else 0
        self._length = length
        return length

    def reset(self) -> None:
        """Forgets every row."""
        self.truncate(0)

    def _states(self) -> States:
        """The states after the last row, which may be written to; none where all can be cut."""
        return {}

    def _advance(self, rows: int) -> None:
        """Counts rows that were run."""
        start, self._length = self._length, self._length + rows
        visual = np.flatnonzero(self._is_visual[start : self._length])
        if self._schedule is not None and self._schedule.is_ranked and len(visual):
            self._ranked.append(range(start + int(visual[0]), self._length))
        states = self._states()
        if states and rows > 1:
            self._kept[self._length] = {name: state.copy() for name, state in states.items()}

    def _text_rows(
        self, rows: int, is_visual: npt.NDArray[np.bool_] | None
    ) -> npt.NDArray[np.int64]:
        """Notes which of the next rows count in which stage, and returns the numbers of the text's.

        Raises:
            InputError: The last row is visual.
        """
        flags = np.zeros(rows, np.bool_) if is_visual is None else is_visual
        if flags[-1]:
            raise InputError(
                "the last row of a call is visual, and visual rows are dropped before the "
                "decoder's last layer: send the text after the picture with it"
            )
        following = slice(self._length, self._length + rows)
        self._is_visual[following] = flags
        self._counts[:, following] = ~flags
        if self._schedule is not None and flags.any():
            visual = self._length + np.flatnonzero(flags)
            for stage, counts in enumerate(self._counts, start=1):
                counts[visual[: self._schedule.kept(stage, len(visual))]] = True
        return np.flatnonzero(~flags)

    def _require_room(self, rows: int) -> None:
        if self._length + rows > self.capacity:
            raise InputError(
                f"the conversation needs {self._length + rows} rows of KV cache; allowed are "
                f"{self.capacity} (the runner's capacity)"
            )
