"""Which weight forms Core ML can hold, by the oldest system that has to read them."""

from __future__ import annotations

from typing import Literal, get_args

from pocketvlm.weights.layout import AffineLayout, CodebookLayout, SparseLayout, WeightLayout

__all__ = ["DEPLOYMENTS", "Deployment", "container_bits", "explain_misfit"]

Deployment = Literal["iOS17", "iOS18"]
DEPLOYMENTS: tuple[Deployment, ...] = get_args(Deployment)

_INDEX_BITS: dict[Deployment, tuple[int, ...]] = {
    "iOS17": (1, 2, 4, 6, 8),
    "iOS18": (1, 2, 3, 4, 6, 8),
}
_MAX_BITS = 8


def container_bits(bits: int, deployment: Deployment) -> int:
    """Bits in which Core ML stores an index of `bits` bits, at most 8."""
    return next(width for width in _INDEX_BITS[deployment] if width >= bits)


def explain_misfit(
    form: WeightLayout, rows: int, columns: int, deployment: Deployment
) -> str | None:
    """Why Core ML cannot hold a matrix [rows, columns] in a form, and what would work."""
    if isinstance(form, AffineLayout):
        return _explain_affine(form, columns, deployment)
    if isinstance(form, SparseLayout):
        return _explain_sparse(form, rows, columns, deployment)
    return _explain_codebook(form, rows, columns, deployment)


def _explain_affine(form: AffineLayout, columns: int, deployment: Deployment) -> str | None:
    if deployment == "iOS18":
        return None
    if form.bits == _MAX_BITS and form.group_size >= columns:
        return None
    return (
        f"{form.bits} bits in groups of {form.group_size} need iOS 18; for iOS 17, 8 bits with "
        "group_size: row would work, one scale a row"
    )


def _explain_sparse(
    form: SparseLayout, rows: int, columns: int, deployment: Deployment
) -> str | None:
    if form.values is None:
        return None
    if deployment == "iOS17":
        return (
            "sparse integers and tables need iOS 18; for iOS 17, sparse float16 values would "
            "work, or the same weights without a mask where these do"
        )
    return explain_misfit(form.values, rows, columns, deployment)


def _explain_codebook(
    form: CodebookLayout, rows: int, columns: int, deployment: Deployment
) -> str | None:
    extras = [
        (form.residual_bits is not None, "a residual codebook"),
        (form.outlier_columns > 0, "outlier columns"),
        (form.column_scales, "scales of columns"),
    ]
    extra = next((label for found, label in extras if found), None)
    if extra is not None:
        return f"Core ML's look-up has no place for {extra}; one codebook without would work"
    if form.index_bits > _MAX_BITS:
        return (
            f"indices of {form.index_bits} bits cannot be looked up by Core ML; at most 8 bits, "
            "256 centroids, would work"
        )
    if columns % form.column_groups:
        return (
            f"{form.column_groups} column groups do not divide {columns} columns; a divisor "
            "would work"
        )
    if rows % (form.row_groups * form.vector_length):
        return (
            f"{form.row_groups} row groups of vectors of {form.vector_length} do not divide "
            f"{rows} rows; a divisor would work"
        )
    if deployment == "iOS18":
        return None
    tables = form.row_groups * form.column_groups
    if tables > 1 or form.vector_length > 1 or form.row_scales:
        return (
            "vectors, several tables and scales of rows need iOS 18; for iOS 17, one table of "
            "single values would work"
        )
    return None
