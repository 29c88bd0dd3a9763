"""How weights are stored, without their numbers: what plans, solvers and targets reason with.

Every weight carries its layout (`WeightForm.layout`), and a stage plans the layouts of the weights
that it will make. A layout knows its bytes from shapes alone; tests compare them with the weight's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from pocketvlm.errors import RecipeError

__all__ = [
    "AffineLayout",
    "CodebookLayout",
    "LayerBytes",
    "SparseLayout",
    "WeightLayout",
    "has_groups",
    "plan_behind_mask",
    "without_mask",
]

_BYTE = 8
_FLOAT16_BYTES = 2
_ORDER_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class AffineLayout:
    """The layout of an `AffineWeight`.

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

    def has_byte_rows(self, columns: int) -> bool:
        """Whether it is int8 around zero with one scale per row: what integer kernels multiply."""
        return self.bits == _BYTE and self.symmetric and self.group_size >= columns

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of codes, scales and zero points of a matrix [rows, columns]."""
        groups = -(-columns // self.group_size)
        row = -(-groups * self.group_size * self.bits // 8)
        return rows * row + self.grid_bytes(rows, columns)

    def grid_bytes(self, rows: int, columns: int) -> int:
        """Bytes of scales and zero points alone."""
        row = _FLOAT16_BYTES
        if not self.symmetric:
            row += _FLOAT16_BYTES if self.float_zeros else 1
        return rows * -(-columns // self.group_size) * row


@dataclass(frozen=True, kw_only=True)
class CodebookLayout:
    """The layout of a `CodebookWeight`.

    Attributes:
        index_bits: Bits of an index into the main codebooks.
        vector_length: Rows that an index stands for.
        row_groups: Groups of rows, each with codebooks.
        column_groups: Groups of columns, each with codebooks.
        residual_bits: Bits of an index into the residual codebooks; `None` without a residual.
        outlier_columns: Columns with a separate codebook.
        outlier_bits: Bits of an index into that codebook.
        outlier_length: Rows that such an index stands for.
        is_ordered: Whether columns are stored in another order than the natural one.
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
    is_ordered: bool = False
    row_scales: bool = False
    column_scales: bool = False
    is_shared: bool = False
    owns_codebooks: bool = True

    @property
    def is_palette(self) -> bool:
        """Whether it looks up single values in small tables and no more, up to scales of rows."""
        return (
            self.vector_length == 1
            and self.column_groups == 1
            and self.index_bits <= _BYTE
            and self.residual_bits is None
            and not self.outlier_columns
            and not self.is_ordered
            and not self.column_scales
        )

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
        if self.is_ordered:
            count += columns * _ORDER_BYTES
        return count


@dataclass(frozen=True, kw_only=True)
class SparseLayout:
    """The layout of a `SparseWeight`.

    Attributes:
        density: Share of the elements that are kept, above 0 and up to 1.
        values: What kept elements are stored as; `None` for float16. A codebook holds single
            values in one group of columns, with indices of up to 8 bits, and has no extras but
            scales of rows.
    """

    density: float
    values: AffineLayout | CodebookLayout | None = None

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}; allowed are values above 0 and up to 1")
        values = self.values
        if isinstance(values, CodebookLayout) and not values.is_palette:
            raise ValueError(
                "a sparse codebook holds up to 256 single values per group of rows, and no extras"
            )

    @property
    def without_mask(self) -> AffineLayout | None:
        """The layout on runtimes that know no masks (`WeightForm.without_mask`).

        Integers stay integers where a code of every group means zero, which is what the masked
        elements become; everything else is stored as floats, `None`.
        """
        values = self.values
        return values if isinstance(values, AffineLayout) and not values.float_zeros else None

    def kept(self, rows: int, columns: int) -> int:
        """Elements of a matrix [rows, columns] that are kept."""
        return round(self.density * rows * columns)

    @property
    def value_bits(self) -> int:
        """Bits that are stored of a kept element."""
        if self.values is None:
            return _FLOAT16_BYTES * _BYTE
        if isinstance(self.values, AffineLayout):
            return self.values.bits
        return self.values.index_bits

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of mask, values, scales and tables of a matrix [rows, columns]."""
        count = rows * -(-columns // _BYTE)
        count += -(-self.kept(rows, columns) * self.value_bits // _BYTE)
        if isinstance(self.values, AffineLayout):
            count += self.values.grid_bytes(rows, columns)
        elif self.values is not None:
            count += self.values.codebook_bytes() if self.values.owns_codebooks else 0
            count += rows * _FLOAT16_BYTES if self.values.row_scales else 0
        return count


WeightLayout = AffineLayout | CodebookLayout | SparseLayout

LayerBytes = Callable[[WeightLayout | None, tuple[int, int]], int]
"""Bytes of one matrix [rows, columns] in a file, by its layout; `None` for one that stays float."""


def without_mask(layout: WeightLayout | None) -> AffineLayout | CodebookLayout | None:
    """A layout on runtimes that know no masks; itself where it has none."""
    return layout.without_mask if isinstance(layout, SparseLayout) else layout


def has_groups(layout: WeightLayout | None, columns: int) -> bool:
    """Whether a matrix is stored as integers in groups, which int8 rows can be made of."""
    plain = without_mask(layout)
    return isinstance(plain, AffineLayout) and not plain.has_byte_rows(columns)


def plan_behind_mask(name: str, mask: SparseLayout, values: WeightLayout) -> SparseLayout:
    """What a pruned layer will be stored as, once it is quantized too.

    Args:
        name: The layer.
        mask: What it is before.
        values: What a quantizer makes of it, told of the mask or not.

    Raises:
        RecipeError: Elements of such a form cannot be stored one by one.
    """
    found = values.values if isinstance(values, SparseLayout) else values
    try:
        return replace(mask, values=found)
    except ValueError as error:
        raise RecipeError(
            f"{name}: is pruned to {mask.density:.0%} and its mask has to survive: {error}; "
            "allowed are integers, or codebooks with vector_length 1, column_groups 1, at most 8 "
            "index_bits, no residual_bits, no outliers, and normalize rows or none"
        ) from error
