"""Runner: what a conversation needs of an inference engine, whichever it is.

The ONNX runner is the first; one for ExecuTorch or Core ML implements the same five calls. Arrays
are numpy, batch 1; the KV cache lives inside the runner and grows by the rows of each `decode`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pocketvlm.errors import InputError

__all__ = ["Runner"]


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
    ) -> npt.NDArray[np.float32]:
        """Runs L rows after those in the cache, which then holds them too.

        Args:
            embeds: float32 [1, L, width].
            position_ids: int64 [axes, L].
            is_visual: bool [L]: which rows come from a picture; `None` for none of them. Decoders
                that run every row through every layer do not ask.

        Returns:
            Logits of the last row, float32 [vocabulary]; overwritten by the next call.

        Raises:
            InputError: The cache has no room for L more rows, or the last row is visual where
                visual rows end before the last layer; the cache is left as it was.
        """

    def truncate(self, length: int) -> None:
        """Forgets every row from `length` on, at no cost.

        Raises:
            ValueError: The cache holds fewer rows.
        """
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate to {length}: the cache holds {self._length} rows")
        self._length = length

    def reset(self) -> None:
        """Forgets every row."""
        self._length = 0

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
