"""How a matrix is cut into tables, and how these are made and stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketvlm.compress.quantization.codebook.kmeans import cluster
from pocketvlm.compress.quantization.codebook.normalization import NormalizedWeight
from pocketvlm.compress.quantization.codebook.rounding import Table
from pocketvlm.compress.quantization.codebook.rules import CodebookRule
from pocketvlm.weights.codebook import CodebookWeight, Lookup

__all__ = ["TableLayout", "cluster_groups"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TableLayout:
    """How a matrix is cut into tables.

    Attributes:
        rule: What is wanted.
        rows: Rows of the weight.
        order: Columns in stored order, or `None` for their natural one.
        outliers: Leading columns that get the finer codebook.
        columns: All columns.
    """

    rule: CodebookRule
    rows: int
    columns: int
    order: Tensor | None
    outliers: int

    @classmethod
    def of(cls, rule: CodebookRule, shape: Sequence[int], diagonal: Tensor) -> TableLayout:
        """The layout of a matrix [rows, columns] whose columns are excited by `diagonal`."""
        rows, columns = shape
        outliers = rule.outlier_columns(columns)
        order = None
        if outliers or rule.column_groups > 1:
            order = torch.argsort(diagonal, descending=True, stable=True)
        return cls(rule=rule, rows=rows, columns=columns, order=order, outliers=outliers)

    @property
    def row_groups(self) -> int:
        """Groups of rows with their own codebooks."""
        return self.rows // (self.rule.rows_a_group or self.rows)

    def spans(self) -> Iterator[tuple[Tensor, int, int, int]]:
        """Columns of each table, its row groups, bits and vector length; outliers first."""
        rule = self.rule
        order = torch.arange(self.columns) if self.order is None else self.order
        if self.outliers:
            yield order[: self.outliers], 1, rule.outlier_bits, rule.outlier_length
        width = -(-(self.columns - self.outliers) // rule.column_groups)
        for columns in order[self.outliers :].split(width):
            yield columns, self.row_groups, rule.index_bits or 0, rule.vector_length

    def make(
        self, normal: NormalizedWeight, diagonal: Tensor, seed: int, shared: Tensor | None
    ) -> tuple[Table, ...]:
        """Tables by weighted k-means, without any residual."""
        if shared is not None:
            (columns, *_) = next(self.spans())
            return (Table(columns=columns, first=shared[0].to(torch.float32)),)
        return tuple(
            Table(
                columns=columns,
                first=cluster_groups(
                    normal, normal.values, diagonal, columns, groups, bits, d, seed
                ),
            )
            for columns, groups, bits, d in self.spans()
        )

    def assemble(
        self,
        tables: Sequence[Table],
        codes: Tensor,
        normal: NormalizedWeight,
        shared: Tensor | None,
    ) -> CodebookWeight:
        """What is stored."""
        rule = self.rule
        main = tables[1:] if self.outliers else tables
        vectors = self.rows // rule.vector_length

        def lookup(books: Sequence[Tensor], own: Sequence[Table], bits: int, start: int) -> Lookup:
            count = self.rows // books[0].shape[2]
            columns = torch.cat([table.columns for table in own])
            indices = codes[columns, start : start + count].T.contiguous()
            made = torch.stack(list(books), dim=1).to(torch.float16)
            return Lookup.from_indices(indices, made if shared is None else shared, index_bits=bits)

        second = [table.second for table in main if table.second is not None]
        return CodebookWeight(
            main=lookup([table.first for table in main], main, rule.index_bits or 0, 0),
            residual=lookup(second, main, rule.residual_bits or 0, vectors) if second else None,
            outliers=(
                lookup([tables[0].first], tables[:1], rule.outlier_bits, 0)
                if self.outliers
                else None
            ),
            order=None if self.order is None else self.order.to(torch.int32),
            row_scales=normal.row_scales,
            column_scales=normal.column_scales,
            column_offsets=normal.column_offsets,
        )


def cluster_groups(
    normal: NormalizedWeight,
    values: Tensor,
    diagonal: Tensor,
    columns: Tensor,
    groups: int,
    bits: int,
    length: int,
    seed: int,
) -> Tensor:
    """One k-means per group of rows; float32 [groups, k, d]."""
    # A natural order needs no copy.
    is_whole = columns.shape[0] == values.shape[0] and bool((columns[1:] > columns[:-1]).all())
    chosen = values if is_whole else values[columns]
    vectors = chosen.view(columns.shape[0], groups, -1, length)
    heights = normal.importance.view(groups, -1, length).mean(2)
    keeps = None if normal.keeps is None else normal.keeps[columns].view(len(columns), groups, -1)
    books = []
    for group in range(groups):
        own = vectors[:, group].reshape(-1, length)
        mass = (diagonal[columns][:, None] * heights[group]).reshape(-1)
        if keeps is not None:
            # A vector under a mask has one element.
            places = keeps[:, group].reshape(-1)
            own, mass = own[places], mass[places]
        books.append(cluster(own, mass, 1 << bits, seed=seed))
    return torch.stack(books).to(torch.float32)
