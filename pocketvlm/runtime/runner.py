"""Runner: what a conversation needs of an inference engine, whichever it is.

The ONNX runner is the first; one for ExecuTorch or Core ML implements the same five calls. Arrays
are numpy, batch 1; the KV cache lives inside the runner and grows by the rows of each `decode`.

Keys and values are cut back at any row by forgetting those after it. A layer that keeps a state
instead, such as the last inputs of a short convolution, has overwritten what was there before; its
runner copies its states after every call of several rows, which is where a turn's prompt ends, and
goes back to such places alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pocketvlm.errors import InputError

__all__ = ["Runner", "States"]

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

    def __init__(self, *, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; a KV cache holds at least 1 row")
        self.capacity = capacity
        self._length = 0
        self._is_text = np.zeros(capacity, np.bool_)
        self._kept: dict[int, States] = {}

    @property
    def length(self) -> int:
        """Rows that the KV cache holds."""
        return self._length

    @property
    def text_length(self) -> int:
        """Rows of text among them: what layers hold that visual rows do not reach.

        Right in runners of such decoders; others do not tell rows apart.
        """
        return int(np.count_nonzero(self._is_text[: self._length]))

    @abstractmethod
    def encode_image(
        self, pixels: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Pixels [1, C, S, S] to embeddings [1, k, width] and indices [1, k], both the caller's."""

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
                visual rows end before the last layer; the cache is left as it was.
        """

    def truncate(self, length: int) -> int:
        """Forgets every row from `length` on, at no cost.

        Returns:
            Rows that are left: fewer than `length` where layers keep states and none are known of
            this place.

        Raises:
            ValueError: The cache holds fewer rows.
        """
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate to {length}: the cache holds {self._length} rows")
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
        self._length += rows
        states = self._states()
        if states and rows > 1:
            self._kept[self._length] = {name: state.copy() for name, state in states.items()}

    def _text_rows(
        self, rows: int, is_visual: npt.NDArray[np.bool_] | None
    ) -> npt.NDArray[np.int64]:
        """Notes which of the next rows are text, and returns their numbers.

        Raises:
            InputError: The last row is visual.
        """
        is_text = np.ones(rows, np.bool_) if is_visual is None else ~is_visual
        if not is_text[-1]:
            raise InputError(
                "the last row of a call is visual, and visual rows end before the decoder's last "
                "layer: send the text after the picture with it"
            )
        self._is_text[self._length : self._length + rows] = is_text
        return np.flatnonzero(is_text)

    def _require_room(self, rows: int) -> None:
        if self._length + rows > self.capacity:
            raise InputError(
                f"the conversation needs {self._length + rows} rows of KV cache; allowed are "
                f"{self.capacity} (the runner's capacity)"
            )
