"""Rows of a picture whose tiles are put together again: what follows what, and what is left out.

A model that lays the features of all tiles out as one map (LLaVA-NeXT) ends each line of it with a
learned row and leaves out what shows the border. The tower knows nothing of that: it returns tiles,
and who lays a prompt out takes rows of them in this order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["LINE_BREAK", "RowOrder"]

LINE_BREAK = -1
"""Source of the row that ends a line: the last one of a table that has it after all others."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowOrder:
    """The rows that stand for the placeholders of one picture.

    Attributes:
        sources: int64 [placeholders]: each one's row among those of all tiles, one tile after
            another, or `LINE_BREAK`. The last rows are whole lines.
        before: Rows before the first line.
        line: Rows of a line, its break included.
    """

    sources: npt.NDArray[np.int64]
    before: int
    line: int

    def kept(
        self, indices: npt.NDArray[np.int64], per_tile: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """What is left where tiles were reduced; a break stays with any row of its line.

        Args:
            indices: int64 [tiles, k]: which of its tokens each tile kept, ascending.
            per_tile: Tokens of a tile before.

        Returns:
            Rows among the tiles * k, or `LINE_BREAK`, and the placeholders that they stand for,
            both int64 [rows].
        """
        tiles, count = indices.shape
        places = np.full(tiles * per_tile + 1, LINE_BREAK)
        first = per_tile * np.arange(tiles)[:, None]
        places[(first + indices).ravel()] = np.arange(tiles * count)
        rows = places[self.sources]
        is_kept = rows != LINE_BREAK
        lines = is_kept[self.before :].reshape(-1, self.line)
        lines[:, -1] = lines[:, :-1].any(axis=1) | (self.line == 1)
        offsets = np.flatnonzero(is_kept)
        return rows[offsets], offsets
