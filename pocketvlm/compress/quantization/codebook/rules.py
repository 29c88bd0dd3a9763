"""Which layer gets which codebooks, and whether they save anything there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pocketvlm.compress.quantization.rules import LayerRule
from pocketvlm.errors import RecipeError
from pocketvlm.models.layers import LinearSpec
from pocketvlm.weights.layout import CodebookLayout

__all__ = ["CodebookRule", "Normalize", "Share"]

Normalize = Literal["none", "rows", "columns"]
Share = Literal["layer", "part", "auto"]

_MAX_INDEX_BITS = 16
_FLOAT16_BYTES = 2
# A codebook of a layer's own may cost this share of its indices; what costs more is shared.
_OWN_SHARE = 1 / 32


@dataclass(frozen=True, kw_only=True)
class CodebookRule(LayerRule):
    """Indices into small tables of numbers or vectors.

    Attributes:
        index_bits: Bits of an index, 1 to 16; `None` keeps the layer as it is.
        vector_length: Rows that an index stands for; 1 makes a look-up table of numbers.
        rows_a_group: Rows that share codebooks; `None` for all.
        column_groups: Groups of columns with their own codebooks, most excited columns first.
        residual_bits: Bits of an index into a second codebook that is added to the first.
        outliers: Share of the columns, the most excited ones, that get a finer codebook.
        outlier_bits: Bits of an index into that one.
        outlier_length: Rows that such an index stands for.
        normalize: `rows` divides each row by its root mean square, `columns` centres and scales
            each column; either is stored in float16.
        share: Who owns codebooks: each `layer`, or all layers of one `part` under this rule;
            `auto` shares where codebooks would cost more than 1/32 of the layer's indices.
    """

    index_bits: int | None
    vector_length: int = 4
    rows_a_group: int | None = None
    column_groups: int = 1
    residual_bits: int | None = None
    outliers: float = 0.0
    outlier_bits: int = 8
    outlier_length: int = 2
    normalize: Normalize = "rows"
    share: Share = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("index_bits", "residual_bits", "outlier_bits"):
            bits = getattr(self, name)
            if bits is not None and not 1 <= bits <= _MAX_INDEX_BITS:
                raise ValueError(f"{name} must be 1 to {_MAX_INDEX_BITS}, not {bits}")
        for name in ("vector_length", "rows_a_group", "column_groups", "outlier_length"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, not {count}")
        if not 0 <= self.outliers <= 0.5:  # noqa: PLR2004  (more than half are not outliers)
            raise ValueError(f"outliers must lie between 0 and 0.5, not {self.outliers}")
        if self.normalize not in get_args(Normalize):
            raise ValueError(f"normalize must be none, rows or columns, not {self.normalize!r}")
        if self.share not in get_args(Share):
            raise ValueError(f"share must be layer, part or auto, not {self.share!r}")
        if self.rows_a_group is not None and self.rows_a_group % self.vector_length:
            raise ValueError(
                f"rows_a_group {self.rows_a_group} is not a multiple of vector_length "
                f"{self.vector_length}"
            )
        if self.share == "part" and not self._can_share:
            raise ValueError(
                "shared codebooks need normalize rows, one group of rows and of columns, no "
                "residual and no outliers"
            )

    @property
    def keeps_float(self) -> bool:
        """Whether the layers stay as they are."""
        return self.index_bits is None

    @property
    def bits(self) -> float | None:
        """Bits of indices per weight, outliers left aside."""
        if self.index_bits is None:
            return None
        return (self.index_bits + (self.residual_bits or 0)) / self.vector_length

    @property
    def label(self) -> str:
        """The kind of grid, for reports."""
        if self.index_bits is None:
            return "codebook"
        residual = "" if self.residual_bits is None else f"+{1 << self.residual_bits}"
        if self.vector_length == 1 and not residual:
            return f"lut {self.index_bits} bit"
        return f"codebook v{self.vector_length} k{1 << self.index_bits}{residual}"

    def plan(self, linear: LinearSpec) -> CodebookLayout:
        """What a layer will be stored as, as if it owned its codebooks."""
        rows, columns = linear.out_features, linear.in_features
        if self.index_bits is None:
            raise ValueError("the rule has no index_bits")
        self._check_divisors(linear)
        apart = self.outlier_columns(columns)
        planned = CodebookLayout(
            index_bits=self.index_bits,
            vector_length=self.vector_length,
            row_groups=rows // (self.rows_a_group or rows),
            column_groups=self.column_groups,
            residual_bits=self.residual_bits,
            outlier_columns=apart,
            outlier_bits=self.outlier_bits,
            outlier_length=self.outlier_length,
            is_ordered=apart > 0 or self.column_groups > 1,
            row_scales=self.normalize == "rows",
            column_scales=self.normalize == "columns",
            is_shared=self._shares(rows, columns),
        )
        narrowest = self._narrowest_group(linear)
        vectors = (self.rows_a_group or rows) // self.vector_length * narrowest
        for bits, count, what in (
            (self.index_bits, vectors, "index_bits"),
            (self.residual_bits or 0, vectors, "residual_bits"),
            (self.outlier_bits, rows // self.outlier_length * apart, "outlier_bits"),
        ):
            if planned.is_shared or (what == "outlier_bits" and not apart):
                continue
            if 1 << bits > count:
                raise RecipeError(
                    f"{what} {bits} asks for {1 << bits} centroids, and {linear.name} has "
                    f"{count} vectors to a codebook; allowed is 1 to {count.bit_length() - 1}"
                )
        self._check_cost(linear, planned)
        return planned

    def outlier_columns(self, columns: int) -> int:
        """Columns that get the finer codebook."""
        return round(self.outliers * columns)

    def grid_columns(self, linear: LinearSpec) -> int:
        """All of them: codes have no scale that a group of columns would share."""
        return linear.in_features

    def describe(self, linear: LinearSpec) -> dict[str, object]:
        """The rule's part of a layer's line in the report."""
        row: dict[str, object] = {"bits": self.bits, "group_size": None, "grid": self.label}
        if self.index_bits is None:
            return row
        planned = self.plan(linear)
        return {**row, "codebook_bytes": planned.codebook_bytes(), "is_shared": planned.is_shared}

    @property
    def _can_share(self) -> bool:
        return (
            self.normalize == "rows"
            and self.rows_a_group is None
            and self.column_groups == 1
            and self.residual_bits is None
            and self.outliers == 0
        )

    def _shares(self, rows: int, columns: int) -> bool:
        if self.share != "auto" or not self._can_share or self.index_bits is None:
            return self.share == "part"
        own = CodebookLayout(index_bits=self.index_bits, vector_length=self.vector_length)
        return own.codebook_bytes() > _OWN_SHARE * own.index_bytes(rows, columns)

    def _check_divisors(self, linear: LinearSpec) -> None:
        rows = linear.out_features
        wanted = [("vector_length", self.vector_length), ("rows_a_group", self.rows_a_group)]
        if self.outlier_columns(linear.in_features):
            wanted.append(("outlier_length", self.outlier_length))
        for name, count in wanted:
            if count is not None and rows % count:
                allowed = [size for size in range(1, min(rows, 2 * count) + 1) if rows % size == 0]
                raise RecipeError(
                    f"{name} {count} does not divide the {rows} rows of {linear.name}; allowed "
                    f"are {', '.join(map(str, allowed[-6:]))}"
                )

    def _narrowest_group(self, linear: LinearSpec) -> int:
        """Columns of the last group of columns, which is the narrowest."""
        columns = linear.in_features - self.outlier_columns(linear.in_features)
        width = -(-columns // self.column_groups)
        narrowest = columns - (self.column_groups - 1) * width
        if narrowest < 1:
            raise RecipeError(
                f"column_groups {self.column_groups} of {width} columns are more than the "
                f"{columns} columns of {linear.name}"
            )
        return narrowest

    def _check_cost(self, linear: LinearSpec, planned: CodebookLayout) -> None:
        """Refuses codebooks that cost more than they save beside float16, or beside 8 bits."""
        rows, columns = linear.out_features, linear.in_features
        dense = _FLOAT16_BYTES * rows * columns
        total = planned.stored_bytes(rows, columns)
        books = planned.codebook_bytes()
        spare = dense - rows * columns
        if planned.is_shared or (total < dense and books <= spare):
            return
        raise RecipeError(
            f"{linear.name}: codebooks of {books} bytes beside {planned.index_bytes(rows, columns)}"
            f" bytes of indices cost more than they save: {dense} bytes in float16, "
            f"{dense - spare} with 8 bits; take fewer index_bits, fewer groups, or share: part"
        )
