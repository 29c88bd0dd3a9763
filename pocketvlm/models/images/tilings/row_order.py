"""Rows of a picture whose tiles are put together again: what follows what, and what is left out.

A model that lays the features of all tiles out as one map (LLaVA-NeXT) ends each line of it with a
learned row and leaves out what shows the border; a map that is too large is made smaller. The tower
knows nothing of that: it returns tiles, and who lays a prompt out takes rows of them in this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["LINE_BREAK", "KeptRows", "RowOrder"]

LINE_BREAK = -1
"""Source of the row that ends a line: the last one of a table that has it after all others."""


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptRows:
    """The rows of one picture after its tiles were reduced.

    Attributes:
        rows: int64 [rows, mixed]: what each is made of, rows among the k of all tiles, or
            `LINE_BREAK`.
        offsets: int64 [rows]: the placeholders that they stand for, ascending.
        weights: float32 [rows, mixed], of sum 1; `None` where nothing is mixed.
    """

    rows: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class RowOrder:
    """The rows that stand for the placeholders of one picture.

    Attributes:
        sources: int64 [placeholders, mixed]: what each one is made of, rows among those of all
            tiles, one tile after another, or `LINE_BREAK`. The last rows are whole lines.
        before: Rows before the first line.
        line: Rows of a line, its break included.
        seen: Numbers of the tiles that the tower sees, ascending.
        weights: float32 [placeholders, mixed]: shares of what is mixed; `None` where every row is
            one row of a tile.
    """

    sources: npt.NDArray[np.int64]
    before: int
    line: int
    seen: Sequence[int]
    weights: npt.NDArray[np.float32] | None = None

    def kept(self, indices: Sequence[npt.NDArray[np.int64]], per_tile: int) -> KeptRows:
        """What is left where tiles were left out or reduced.

        A mixed row stays with the token that has the largest share of it, and is mixed of those
        that are left; a break stays with any row of its line.

        Args:
            indices: int64 [k] of each tile that is seen: which of its tokens it kept, ascending.
            per_tile: Tokens of a tile before.
        """
        tiles = zip(self.seen, indices, strict=True)
        own = np.concatenate([per_tile * number + kept for number, kept in tiles])
        # One more than any source: the last is what `LINE_BREAK` reads.
        places = np.full(max(own.max(), self.sources.max()) + 2, LINE_BREAK)
        places[own] = np.arange(own.size)
        rows = places[self.sources]
        is_left = rows != LINE_BREAK
        weights = self.weights
        if weights is None:
            is_kept = is_left[:, 0]
        else:
            is_kept = np.take_along_axis(is_left, weights.argmax(axis=1)[:, None], axis=1)[:, 0]
        lines = is_kept[self.before :].reshape(-1, self.line)
        lines[:, -1] = lines[:, :-1].any(axis=1) | (self.line == 1)
        offsets = np.flatnonzero(is_kept)
        if weights is not None:
            is_break = self.sources == LINE_BREAK
            weights = np.where(is_left | is_break, weights, np.float32(0))[offsets]
            weights = weights / weights.sum(axis=1, keepdims=True)
        return KeptRows(rows=rows[offsets], offsets=offsets, weights=weights)
