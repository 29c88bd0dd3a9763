"""Streaming: token ids in, pieces of text out, never half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["TextStream"]

_REPLACEMENT = "\ufffd"


class TextStream:
    """Turns a growing answer into pieces whose concatenation is the decoded, stripped answer.

    A byte-level token may end inside a character, which decodes to U+FFFD until the rest arrives;
    such a tail is held back, and so is white space, which the end of the answer may strip. Only a
    window of the last tokens is decoded again at each step: the window starts one piece early,
    because some tokenizers drop the space before a text's first word.

    Attributes:
        token_ids: Everything pushed so far.
        text: Everything returned so far.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """Starts an answer.

        Args:
            decode: Tokens to text, special tokens left out and spaces kept.
        """
        self.token_ids: list[int] = []
        self.text = ""
        self._decode = decode
        self._held = ""
        self._window = 0
        self._done = 0

    def push(self, token_id: int) -> str:
        """Takes one token; returns what is certain now, often one word, sometimes nothing."""
        self.token_ids.append(token_id)
        before = self._decode(self.token_ids[self._window : self._done])
        after = self._decode(self.token_ids[self._window :])
        if len(after) <= len(before) or after.endswith(_REPLACEMENT):
            return ""
        self._window, self._done = self._done, len(self.token_ids)
        return self._emit(after[len(before) :])

    def finish(self) -> str:
        """Ends the answer; returns what was held back, less the white space at its end."""
        before = self._decode(self.token_ids[self._window : self._done])
        after = self._decode(self.token_ids[self._window :])
        self._done = len(self.token_ids)
        piece = self._emit(after[len(before) :])
        self._held = ""
        return piece

    def _emit(self, piece: str) -> str:
        pending = self._held + piece
        if not self.text:
            pending = pending.lstrip()
        certain = pending.rstrip()
        self._held = pending[len(certain) :]
        self.text += certain
        return certain
