"""Columns of a weight as vectors out of small tables: nearest entries, column by column.

Within one input column every element has the same (H^-1)_jj, so what second-order rounding looks
for is the nearest entry (VPTQ, arXiv 2409.17066, section 3: channel-independent optimization). Rows
that were divided by scales count with the squares of those scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketvlm.compress.quantization.codebook.kmeans import LeastProducts

__all__ = ["CodebookRounding", "Table", "decode_tables", "flat_codes", "row_pieces"]

# How many entries of the first codebook are tried with all of the second.
_BEAM = 4
_PIECE_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Columns that share codebooks.

    Attributes:
        columns: Their places in the weight, in the order in which they are stored.
        first: float32 [row_groups, k, d]; its values fit into float16.
        second: What is added to it, of the same kind, or `None`.
    """

    columns: Tensor
    first: Tensor
    second: Tensor | None = None

    @property
    def books(self) -> tuple[Tensor, ...]:
        """One codebook, or two."""
        return (self.first,) if self.second is None else (self.first, self.second)

    def codes_a_column(self, rows: int) -> int:
        """Indices that one column takes."""
        return len(self.books) * (rows // self.first.shape[2])


class CodebookRounding:
    """Rounds each column to the nearest entries of its table.

    Args:
        tables: Of all columns that will come.
        columns: Which column comes when.
        importance: How much an error in each row counts, [rows].
    """

    def __init__(self, tables: Sequence[Table], columns: Tensor, importance: Tensor) -> None:
        self._rows = importance.shape[0]
        self._searches = [_Search(table, importance) for table in tables]
        self._width = max(table.codes_a_column(self._rows) for table in tables)
        owner = torch.full((1 + max(int(t.columns.max()) for t in tables),), -1)
        for number, table in enumerate(tables):
            owner[table.columns] = number
        self._turns = iter(owner[columns].tolist())

    def enter_group(self, group: int, weights: Tensor, keeps: Tensor | None = None) -> None:
        """Tables are made beforehand, from all columns."""

    def round(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds the next column; codes of narrower tables are padded by zeros."""
        codes, decoded = self._searches[next(self._turns)].nearest(weights)
        if codes.shape[0] < self._width:
            codes = torch.nn.functional.pad(codes, (0, self._width - codes.shape[0]))
        return codes, decoded


class _Search:
    """Nearest entries of one table, for rows that differ in importance.

    |w - c|^2 = |w|^2 - 2 (m w) c + m c^2, of which the first does not depend on the entry: half of
    the rest is one product of [m w, m] and [-c, c^2 / 2].
    """

    def __init__(self, table: Table, importance: Tensor) -> None:
        groups, _, length = table.first.shape
        self._flat = [book.reshape(-1, length).to(torch.float64) for book in table.books]
        self._weights = importance.to(torch.float32).view(groups, -1, length)
        self._left = torch.cat([self._weights, self._weights], dim=2)
        self._weighed = self._left[..., :length]
        turned = [book.transpose(1, 2) for book in table.books]
        self._right = [torch.cat([-book, book.square() / 2], dim=1) for book in turned]
        self._least = [LeastProducts(right, self._weights.shape[1]) for right in self._right]
        self._starts = [torch.arange(groups)[:, None] * book.shape[1] for book in table.books]

    def nearest(self, column: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of one column, those of the second codebook after all of the first."""
        vectors = column.view(self._weights.shape)
        if len(self._flat) == 1:
            chosen = self._least[0].find(self._weigh(vectors))
            codes, decoded = chosen.view(-1), self._entries(0, chosen)
        else:
            first, second = self._nearest_sums(vectors.to(torch.float32))
            codes = torch.cat([first.reshape(-1), second.reshape(-1)])
            decoded = self._entries(0, first) + self._entries(1, second)
        return codes, decoded.view(-1).to(column.dtype)

    def _weigh(self, vectors: Tensor) -> Tensor:
        """The product's left side, in a buffer that the next call overwrites."""
        self._weighed.copy_(vectors).mul_(self._weights)
        return self._left

    def _entries(self, number: int, chosen: Tensor) -> Tensor:
        """What a book's indices [groups, vectors] stand for, float64 [all vectors, d]."""
        places = chosen if chosen.shape[0] == 1 else chosen + self._starts[number]
        return self._flat[number].index_select(0, places.reshape(-1))

    def _nearest_sums(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The best of the sums of a few near first entries and any second one."""
        scores = torch.bmm(self._weigh(vectors), self._right[0])
        most = min(_BEAM, scores.shape[2])
        tried = scores.topk(most, dim=2, largest=False).indices
        found: list[tuple[Tensor, Tensor]] = []
        for place in range(most):
            rest = vectors - self._entries(0, tried[..., place]).to(torch.float32).view_as(vectors)
            second = self._least[1].find(self._weigh(rest))
            left = rest - self._entries(1, second).to(torch.float32).view_as(vectors)
            found.append(((self._weights * left.square()).sum(2), second))
        best = torch.stack([loss for loss, _ in found]).argmin(0)
        seconds = torch.stack([second for _, second in found], dim=2)
        return (
            tried.gather(2, best[..., None])[..., 0],
            seconds.gather(2, best[..., None])[..., 0],
        )


def row_pieces(tables: Sequence[Table], columns: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Rows that may be rounded, decoded and judged apart, each with its codes of a column.

    Tables are given, so no row knows of another, and a token table of millions of weights need not
    be in float64 at once. Where a column's codes are not one per vector (groups of rows, a
    residual, vectors of two lengths), all rows are one piece.
    """
    length = tables[0].first.shape[2]
    if any(t.second is not None or t.first.shape[::2] != (1, length) for t in tables):
        yield slice(0, rows), slice(None)
        return
    step = max(1, _PIECE_ELEMENTS // (columns * length))
    for start in range(0, rows // length, step):
        end = min(start + step, rows // length)
        yield slice(start * length, end * length), slice(start, end)


def decode_tables(
    tables: Sequence[Table], codes: Tensor, rows: int, keeps: Tensor | None = None
) -> Tensor:
    """What codes [columns, codes per column] stand for, float32 [columns, rows].

    Zero wherever a mask, bool [columns, rows], does not keep an element.
    """
    dense = torch.empty(codes.shape[0], rows)
    for table in tables:
        flat, entries = flat_codes(table, codes, rows)
        values = sum(book[index] for book, index in zip(entries, flat, strict=True))
        dense[table.columns] = torch.as_tensor(values).reshape(-1, rows)
    return dense if keeps is None else dense.masked_fill_(~keeps, 0.0)


def flat_codes(table: Table, codes: Tensor, rows: int) -> tuple[list[Tensor], list[Tensor]]:
    """Codes of a table as indices into its books laid flat, [columns, vectors], and those books."""
    groups, _, length = table.first.shape
    vectors = rows // length
    group = torch.arange(vectors) // (vectors // groups)
    flat, books = [], []
    for number, book in enumerate(table.books):
        own = codes[table.columns, number * vectors : (number + 1) * vectors]
        flat.append(own + group * book.shape[1])
        books.append(book.reshape(-1, length))
    return flat, books
