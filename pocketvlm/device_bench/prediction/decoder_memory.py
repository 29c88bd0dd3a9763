"""What ONNX Runtime takes for a call of the decoder, beside weights and cache."""

from __future__ import annotations

from dataclasses import dataclass

from pocketvlm.runtime.runner import PREFILL_PIECE_ROWS

__all__ = ["DecoderMemory"]

_SCORE_BYTES = 4
_MOST = 2**40


@dataclass(frozen=True, kw_only=True)
class DecoderMemory:
    """Activations of the decoder, which grow with the rows of a call.

    Attributes:
        heads: Heads of an attention.
        row_bytes: What a row takes at the peak beside its scores.
        takes_pieces: Whether the runners part a long call: not where rows see later ones, or where
            a schedule drops some.
    """

    heads: int
    row_bytes: int
    takes_pieces: bool = True

    def __post_init__(self) -> None:
        for name in ("heads", "row_bytes"):
            if not 0 <= getattr(self, name) <= _MOST:
                raise ValueError(f"{name} must be 0 to {_MOST:,}")

    def call_bytes(self, rows: int, cache_rows: int) -> int:
        """Bytes of a call.

        Args:
            rows: Its rows.
            cache_rows: Rows that the cache has room for: scores are made for all of them.
        """
        together = min(rows, PREFILL_PIECE_ROWS) if self.takes_pieces else rows
        return together * (self.row_bytes + _SCORE_BYTES * self.heads * cache_rows)
