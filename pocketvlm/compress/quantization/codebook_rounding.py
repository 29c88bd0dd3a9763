"""Columns of a weight as vectors out of small tables: nearest entries, column by column.

Within one input column every element has the same (H^-1)_jj, so what second-order rounding looks
for is the nearest entry (VPTQ, arXiv 2409.17066, section 3: channel-independent optimization). Rows
that were divided by scales count with the squares of those scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketvlm.compress.quantization.kmeans import least_places

__all__ = ["CodebookRounding", "Table", "decode_tables", "flat_codes"]

# How many entries of the first codebook are tried with all of the second.
_BEAM = 4


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
    """Nearest entries of one table, for rows that differ in importance."""

    def __init__(self, table: Table, importance: Tensor) -> None:
        groups, _, length = table.first.shape
        self._books = table.books
        self._flat = [book.reshape(-1, length).to(torch.float64) for book in table.books]
        self._weights = importance.to(torch.float32).view(groups, -1, length)
        self._turned = [book.transpose(1, 2).contiguous() for book in table.books]
        # |w - c|^2 = |w|^2 - 2 (m w) c + m c^2, of which the last does not depend on the column.
        self._halves = [
            torch.bmm(self._weights, book.transpose(1, 2).square()) / 2 for book in table.books
        ]
        self._starts = [torch.arange(groups)[:, None] * book.shape[1] for book in table.books]

    def nearest(self, column: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of one column, those of the second codebook behind all of the first."""
        vectors = column.to(torch.float32).view(self._weights.shape)
        scores = torch.baddbmm(self._halves[0], self._weights * vectors, self._turned[0], alpha=-1)
        if len(self._books) == 1:
            chosen = [least_places(scores)]
        else:
            chosen = self._nearest_sums(vectors, scores)
        parts = [
            flat[index + start]
            for flat, index, start in zip(self._flat, chosen, self._starts, strict=True)
        ]
        decoded = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        codes = torch.cat([index.reshape(-1) for index in chosen])
        return codes, decoded.reshape(-1).to(column.dtype)

    def _nearest_sums(self, vectors: Tensor, scores: Tensor) -> list[Tensor]:
        """The best of the sums of a few near first entries and any second one."""
        most = min(_BEAM, scores.shape[2])
        tried = scores.topk(most, dim=2, largest=False).indices
        found: list[tuple[Tensor, Tensor]] = []
        for place in range(most):
            first = tried[..., place]
            entry = self._flat[0][first + self._starts[0]].to(torch.float32)
            rest = vectors - entry
            second_scores = torch.baddbmm(
                self._halves[1], self._weights * rest, self._turned[1], alpha=-1
            )
            least, second = second_scores.min(2)
            found.append((least + (self._weights * rest.square()).sum(2) / 2, second))
        best = torch.stack([loss for loss, _ in found]).argmin(0)
        seconds = torch.stack([second for _, second in found], dim=2)
        return [
            tried.gather(2, best[..., None])[..., 0],
            seconds.gather(2, best[..., None])[..., 0],
        ]


def decode_tables(
    tables: Sequence[Table], codes: Tensor, rows: int, keeps: Tensor | None = None
) -> Tensor:
    """What codes [columns, codes a column] stand for, float32 [columns, rows].

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
