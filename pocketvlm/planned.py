"""What a weight will be stored as, before any is computed: what `plan` and the solvers count with.

Each class mirrors a form of `pocketvlm.weights` and knows its bytes from shapes alone; a test
compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PlannedAffine", "PlannedCodebook", "PlannedForm"]

_FLOAT16_BYTES = 2
_ORDER_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class PlannedAffine:
    """An `AffineWeight` to be.

    Attributes:
        bits: Width of a code.
        group_size: Columns that share a scale.
        symmetric: Whether the zero point is fixed.
        float_zeros: Whether zero points may lie between codes.
    """

    bits: int
    group_size: int
    symmetric: bool
    float_zeros: bool = False

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of codes, scales and zero points of a matrix [rows, columns]."""
        groups = -(-columns // self.group_size)
        row = -(-groups * self.group_size * self.bits // 8) + groups * _FLOAT16_BYTES
        if not self.symmetric:
            row += groups * (_FLOAT16_BYTES if self.float_zeros else 1)
        return rows * row


@dataclass(frozen=True, kw_only=True)
class PlannedCodebook:
    """A `CodebookWeight` to be.

    Attributes:
        index_bits: Bits of an index into the main codebooks.
        vector_length: Rows that an index stands for.
        row_groups: Groups of rows with codebooks of their own.
        column_groups: Groups of columns with codebooks of their own.
        residual_bits: Bits of an index into the residual codebooks; `None` without a residual.
        outlier_columns: Columns with a codebook of their own.
        outlier_bits: Bits of an index into that codebook.
        outlier_length: Rows that such an index stands for.
        row_scales: Whether every row has a scale.
        column_scales: Whether every column has a scale and an offset.
        is_shared: Whether the codebooks belong to several layers; their bytes are then counted
            with the layer that owns them.
        owns_codebooks: Whether this layer's bytes hold the codebooks.
    """

    index_bits: int
    vector_length: int
    row_groups: int = 1
    column_groups: int = 1
    residual_bits: int | None = None
    outlier_columns: int = 0
    outlier_bits: int = 8
    outlier_length: int = 2
    row_scales: bool = False
    column_scales: bool = False
    is_shared: bool = False
    owns_codebooks: bool = True

    def index_bytes(self, rows: int, columns: int) -> int:
        """Bytes of all indices of a matrix [rows, columns]."""
        main = columns - self.outlier_columns
        vectors = rows // self.vector_length
        count = vectors * -(-main * self.index_bits // 8)
        if self.residual_bits is not None:
            count += vectors * -(-main * self.residual_bits // 8)
        if self.outlier_columns:
            per_row = -(-self.outlier_columns * self.outlier_bits // 8)
            count += rows // self.outlier_length * per_row
        return count

    def codebook_bytes(self) -> int:
        """Bytes of all codebooks."""
        groups = self.row_groups * self.column_groups
        values = groups * self.vector_length << self.index_bits
        if self.residual_bits is not None:
            values += groups * self.vector_length << self.residual_bits
        if self.outlier_columns:
            values += self.outlier_length << self.outlier_bits
        return values * _FLOAT16_BYTES

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix [rows, columns]."""
        count = self.index_bytes(rows, columns)
        if self.owns_codebooks:
            count += self.codebook_bytes()
        if self.row_scales:
            count += rows * _FLOAT16_BYTES
        if self.column_scales:
            count += 2 * columns * _FLOAT16_BYTES
        if self.outlier_columns or self.column_groups > 1:
            count += columns * _ORDER_BYTES
        return count


PlannedForm = PlannedAffine | PlannedCodebook
