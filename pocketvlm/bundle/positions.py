"""Positions of visual tokens that are numbered along several axes: time, height and width.

A text row has the same number on every axis, so that a prompt without pictures is numbered as
everywhere. A picture that starts at s has its tokens at (s, s + row, s + column), and what follows
it starts at s plus its longer side (M-RoPE, arXiv 2409.12191, section 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["PositionGrid"]

_LONGEST_SIDE = 2**12


@dataclass(frozen=True, kw_only=True)
class PositionGrid:
    """The visual tokens of one picture as a grid, in raster order.

    Attributes:
        rows: Tokens from top to bottom.
        columns: Tokens from left to right.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if not (1 <= self.rows <= _LONGEST_SIDE and 1 <= self.columns <= _LONGEST_SIDE):
            raise ValueError(f"rows and columns of a grid must be 1 to {_LONGEST_SIDE:,}")

    @property
    def tokens(self) -> int:
        """Visual tokens of a picture."""
        return self.rows * self.columns

    @property
    def advance(self) -> int:
        """Positions that a picture takes, on every axis."""
        return max(self.rows, self.columns)

    def offsets(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Distances from a picture's first position, int64 [3, tokens], of tokens [tokens]."""
        return np.stack([np.zeros_like(indices), indices // self.columns, indices % self.columns])
