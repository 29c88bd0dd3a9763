"""CodebookWeight: weights that are looked up, one by one or as vectors, in small tables.

With vectors of one element this is a palette (a look-up table, LUT), with longer ones the vector
quantization of VPTQ (arXiv 2409.17066). A vector lies along the *output* of one input column:
error feedback across columns then needs no more than the nearest centroid, and Core ML's
`constexpr_lut_to_dense` stores the very same layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pocketvlm.weights.bitpack import pack_codes, unpack_codes
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.layout import CodebookLayout

__all__ = ["CodebookWeight", "Lookup"]

_MAX_INDEX_BITS = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Lookup:
    """A matrix [rows, columns] as indices into codebooks.

    Rows are cut into `row_groups` equal groups and columns into `column_groups` groups of
    ceil(columns / column_groups), the last of which may be narrower; each pair of groups has its
    own codebook.

    Attributes:
        packed: uint8 [rows / d, bytes]: `pack_codes` of one index per vector.
        codebooks: float16 [row_groups, column_groups, k, d]; layers may share the tensor.
        index_bits: Bits of one index; k is at most 2**index_bits.
        columns: Columns of the matrix.
    """

    packed: Tensor
    codebooks: Tensor
    index_bits: int
    columns: int

    def __post_init__(self) -> None:
        if not 1 <= self.index_bits <= _MAX_INDEX_BITS:
            raise ValueError(f"index_bits must be 1 to {_MAX_INDEX_BITS}, not {self.index_bits}")
        if self.codebooks.ndim != 4 or self.codebooks.dtype != torch.float16:  # noqa: PLR2004  (rank)
            raise ValueError("codebooks are float16 [row_groups, column_groups, k, d]")
        row_groups, column_groups, entries, _ = self.codebooks.shape
        if entries > 1 << self.index_bits:
            raise ValueError(f"{entries} centroids do not fit into {self.index_bits} bits")
        if self.packed.shape[0] % row_groups or not 1 <= column_groups <= self.columns:
            raise ValueError(
                f"{row_groups} x {column_groups} groups do not divide {self.packed.shape[0]} rows "
                f"of vectors and {self.columns} columns"
            )
        width = -(-self.columns * self.index_bits // 8)
        if self.packed.dtype != torch.uint8 or self.packed.shape[1] != width:
            raise ValueError(
                f"packed indices are {tuple(self.packed.shape)} {self.packed.dtype}, not "
                f"[..., {width}] torch.uint8"
            )

    @classmethod
    def from_indices(cls, indices: Tensor, codebooks: Tensor, *, index_bits: int) -> Lookup:
        """Builds the matrix from plain indices [rows / d, columns]."""
        packed = pack_codes(indices.numpy(), index_bits)
        return cls(
            packed=torch.from_numpy(packed),
            codebooks=codebooks,
            index_bits=index_bits,
            columns=indices.shape[1],
        )

    @property
    def vector_length(self) -> int:
        """Rows that one index stands for, d."""
        return self.codebooks.shape[3]

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.packed.shape[0] * self.vector_length

    @property
    def group_columns(self) -> int:
        """Columns that share a codebook."""
        return -(-self.columns // self.codebooks.shape[1])

    def indices(self, vectors: Tensor | None = None) -> Tensor:
        """Indices of some or all rows of vectors, int64 [vectors, columns]."""
        packed = self.packed if vectors is None else self.packed[vectors]
        plain = unpack_codes(packed.numpy(), self.index_bits, self.columns)
        return torch.from_numpy(plain.astype("int64"))

    def decode(self, vectors: Tensor | None = None) -> Tensor:
        """Some or all rows of vectors as float32 [vectors, d, columns]."""
        row_groups, column_groups, entries, length = self.codebooks.shape
        places = torch.arange(self.packed.shape[0]) if vectors is None else vectors
        group = places // (self.packed.shape[0] // row_groups) * column_groups
        column = torch.arange(self.columns) // self.group_columns
        flat = self.indices(vectors)
        flat += (group[:, None] + column[None]) * entries
        table = self.codebooks.to(torch.float32).view(-1, length)
        return table[flat].transpose(1, 2)


@dataclass(frozen=True, kw_only=True, eq=False)
class CodebookWeight(WeightForm):
    """w = (main + residual) * row_scale * column_scale + column_offset, outlier columns apart.

    What is absent counts as nothing: the plain form is `main` alone, which every part of Core ML's
    look-up operator can express.

    Attributes:
        main: The matrix, without outlier columns, in processing order.
        residual: A second look-up that is added to `main`.
        outliers: Columns with separate codebooks, in processing order before `main`.
        order: int32 [in_features]: which column stands at each place of (outliers, main); `None`
            for their natural order.
        row_scales: float16 [out_features].
        column_scales: float16 [in_features].
        column_offsets: float16 [in_features].
    """

    kind: ClassVar[str] = "codebook"

    main: Lookup
    residual: Lookup | None = None
    outliers: Lookup | None = None
    order: Tensor | None = None
    row_scales: Tensor | None = None
    column_scales: Tensor | None = None
    column_offsets: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.shape
        if self.residual is not None and (
            self.residual.rows != rows or self.residual.columns != self.main.columns
        ):
            raise ValueError("the residual needs the shape of what it is added to")
        if self.outliers is not None and self.outliers.rows != rows:
            raise ValueError(f"outlier columns have {self.outliers.rows} rows, not {rows}")
        if self.order is not None and sorted(self.order.tolist()) != list(range(columns)):
            raise ValueError(f"order is not a permutation of {columns} columns")
        for name, size in (
            ("row_scales", rows),
            ("column_scales", columns),
            ("column_offsets", columns),
        ):
            values = getattr(self, name)
            if values is not None and (
                tuple(values.shape) != (size,) or values.dtype != torch.float16
            ):
                raise ValueError(f"{name} must be float16 [{size}]")

    @property
    def shape(self) -> tuple[int, int]:
        apart = 0 if self.outliers is None else self.outliers.columns
        return (self.main.rows, self.main.columns + apart)

    @property
    def layout(self) -> CodebookLayout:
        main, residual, outliers = self.main, self.residual, self.outliers
        layout = CodebookLayout(
            index_bits=main.index_bits,
            vector_length=main.vector_length,
            row_groups=main.codebooks.shape[0],
            column_groups=main.codebooks.shape[1],
            residual_bits=None if residual is None else residual.index_bits,
            is_ordered=self.order is not None,
            row_scales=self.row_scales is not None,
            column_scales=self.column_scales is not None or self.column_offsets is not None,
        )
        if outliers is None:
            return layout
        return replace(
            layout,
            outlier_columns=outliers.columns,
            outlier_bits=outliers.index_bits,
            outlier_length=outliers.vector_length,
        )

    def dequantize(self) -> Tensor:
        return self._decode(None)

    def take_rows(self, rows: Tensor) -> Tensor:
        return self._decode(rows.reshape(-1)).reshape(*rows.shape, self.shape[1])

    def to_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for prefix, lookup in (
            ("", self.main),
            ("residual_", self.residual),
            ("outlier_", self.outliers),
        ):
            if lookup is not None:
                tensors[f"{prefix}indices"] = lookup.packed
                tensors[f"{prefix}codebooks"] = lookup.codebooks
        for name in ("order", "row_scales", "column_scales", "column_offsets"):
            values = getattr(self, name)
            if values is not None:
                tensors[name] = values
        return tensors

    def to_metadata(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "index_bits": self.main.index_bits,
            "columns": self.main.columns,
            **(
                {"residual_index_bits": self.residual.index_bits}
                if self.residual is not None
                else {}
            ),
            **(
                {
                    "outlier_index_bits": self.outliers.index_bits,
                    "outlier_columns": self.outliers.columns,
                }
                if self.outliers is not None
                else {}
            ),
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> CodebookWeight:
        def lookup(prefix: str, columns: int) -> Lookup:
            return Lookup(
                packed=tensors[f"{prefix}indices"],
                codebooks=tensors[f"{prefix}codebooks"],
                index_bits=metadata[f"{prefix}index_bits"],
                columns=columns,
            )

        columns = metadata["columns"]
        return cls(
            main=lookup("", columns),
            residual=lookup("residual_", columns) if "residual_indices" in tensors else None,
            outliers=(
                lookup("outlier_", metadata["outlier_columns"])
                if "outlier_indices" in tensors
                else None
            ),
            order=tensors.get("order"),
            row_scales=tensors.get("row_scales"),
            column_scales=tensors.get("column_scales"),
            column_offsets=tensors.get("column_offsets"),
        )

    def _decode(self, rows: Tensor | None) -> Tensor:
        ordered = _rows_of(self.main, rows)
        if self.residual is not None:
            ordered += _rows_of(self.residual, rows)
        if self.outliers is not None:
            ordered = torch.cat([_rows_of(self.outliers, rows), ordered], dim=1)
        dense = ordered
        if self.order is not None:
            dense = torch.empty_like(ordered)
            dense[:, self.order.to(torch.int64)] = ordered
        if self.row_scales is not None:
            scales = self.row_scales if rows is None else self.row_scales[rows]
            dense *= scales.to(torch.float32)[:, None]
        if self.column_scales is not None:
            dense *= self.column_scales.to(torch.float32)
        if self.column_offsets is not None:
            dense += self.column_offsets.to(torch.float32)
        return dense


def _rows_of(lookup: Lookup, rows: Tensor | None) -> Tensor:
    """Some or all rows of a look-up, float32 [rows, columns], in new memory."""
    length = lookup.vector_length
    if rows is None:
        return lookup.decode().reshape(lookup.rows, lookup.columns)
    vectors = lookup.decode(rows // length)
    return vectors[torch.arange(rows.shape[0]), rows % length]
