"""Which layouts Core ML has operators for, by the oldest system that has to read them."""

from __future__ import annotations

from typing import Literal, get_args

from pocketvlm.export.precisions import describe_grid
from pocketvlm.stages import Explanation
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, SparseLayout, WeightLayout

__all__ = ["DEPLOYMENTS", "Deployment", "container_bits", "explain"]

Deployment = Literal["iOS17", "iOS18"]
DEPLOYMENTS: tuple[Deployment, ...] = get_args(Deployment)

_INDEX_BITS: dict[Deployment, tuple[int, ...]] = {
    "iOS17": (1, 2, 4, 6, 8),
    "iOS18": (1, 2, 3, 4, 6, 8),
}
_MAX_BITS = 8
_NIBBLE = 4
_NARROW = (
    "of 2 or 3 bits are stored as indices into 0, 1, 2, ... below their scales: as small as they "
    "can be, and not measured on a device"
)


def container_bits(bits: int, deployment: Deployment) -> int:
    """Bits in which Core ML stores an index of `bits` bits, at most 8."""
    return next(width for width in _INDEX_BITS[deployment] if width >= bits)


def explain(
    layout: WeightLayout | None, shape: tuple[int, int], *, deployment: Deployment, precision: str
) -> Explanation:
    """What Core ML makes of a matrix [rows, columns].

    Args:
        layout: How it is stored in the checkpoint.
        shape: Its rows and columns.
        deployment: The oldest system that has to read it.
        precision: What floats are stored as.
    """
    if layout is None:
        return Explanation(stored=precision)
    refusal = _refuse(layout, shape, deployment)
    if refusal:
        return Explanation(refusal=refusal)
    is_sparse = isinstance(layout, SparseLayout)
    values = layout.values if isinstance(layout, SparseLayout) else layout
    if isinstance(values, AffineLayout):
        stored = describe_grid(values)
    elif values is None:
        stored = "float16"
    else:
        of = "values" if is_sparse else f"vectors of {values.vector_length}"
        stored = f"{values.index_bits}-bit indices of {of}, {values.row_groups} tables"
        stored = f"lut of {stored}" if is_sparse else f"lut {stored}"
    narrow = isinstance(values, AffineLayout) and values.bits < _NIBBLE
    return Explanation(
        stored=f"sparse {stored}" if is_sparse else stored, prices=(_NARROW,) if narrow else ()
    )


def _refuse(layout: WeightLayout, shape: tuple[int, int], deployment: Deployment) -> str:
    """Why there is no operator for a matrix, and what would work; empty where there is one."""
    if isinstance(layout, AffineLayout):
        return _refuse_affine(layout, shape[1], deployment)
    if isinstance(layout, CodebookLayout):
        return _refuse_codebook(layout, shape, deployment)
    if layout.values is None:
        return ""
    if deployment == "iOS17":
        return (
            "sparse integers and tables need iOS 18; for iOS 17, sparse float16 values would "
            "work, or the same weights without a mask where these do"
        )
    return _refuse(layout.values, shape, deployment)


def _refuse_affine(layout: AffineLayout, columns: int, deployment: Deployment) -> str:
    if deployment == "iOS18" or (layout.bits == _MAX_BITS and layout.group_size >= columns):
        return ""
    return (
        f"{layout.bits} bits in groups of {layout.group_size} need iOS 18; for iOS 17, 8 bits with "
        "group_size: row would work, one scale per row"
    )


def _refuse_codebook(layout: CodebookLayout, shape: tuple[int, int], deployment: Deployment) -> str:
    rows, columns = shape
    extras = [
        (layout.residual_bits is not None, "a residual codebook"),
        (layout.outlier_columns > 0, "outlier columns"),
        (layout.column_scales, "scales of columns"),
        (layout.is_ordered, "columns in another order"),
    ]
    extra = next((label for found, label in extras if found), None)
    if extra is not None:
        return f"Core ML's look-up has no place for {extra}; one codebook without would work"
    if layout.index_bits > _MAX_BITS:
        return (
            f"indices of {layout.index_bits} bits cannot be looked up by Core ML; at most 8 bits, "
            "256 centroids, would work"
        )
    if columns % layout.column_groups:
        return (
            f"{layout.column_groups} column groups do not divide {columns} columns; a divisor "
            "would work"
        )
    if rows % (layout.row_groups * layout.vector_length):
        return (
            f"{layout.row_groups} row groups of vectors of {layout.vector_length} do not divide "
            f"{rows} rows; a divisor would work"
        )
    if deployment == "iOS18":
        return ""
    tables = layout.row_groups * layout.column_groups
    if tables > 1 or layout.vector_length > 1 or layout.row_scales:
        return (
            "vectors, several tables and scales of rows need iOS 18; for iOS 17, one table of "
            "single values would work"
        )
    return ""
