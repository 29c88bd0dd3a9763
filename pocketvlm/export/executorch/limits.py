"""What XNNPACK has kernels for: which integers, in which groups, and at which price."""

from __future__ import annotations

from pocketvlm.export.precisions import describe_masked
from pocketvlm.stages import Explanation
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, WeightLayout

__all__ = ["GROUP_MULTIPLE", "explain", "kernel_bits", "needs_offsets"]

GROUP_MULTIPLE = 32
"""Sizes of a group that the blockwise kernels take are multiples of this."""

_NARROW = 4
_WIDE = 8


def kernel_bits(bits: int) -> int:
    """Bits in which XNNPACK stores a code of `bits` bits."""
    return _NARROW if bits <= _NARROW else _WIDE


def needs_offsets(layout: AffineLayout, columns: int) -> bool:
    """Whether a grid costs more than one product."""
    if layout.float_zeros:
        return True
    if layout.bits < _NARROW:
        return False  # code - zero of 3 bits is an integer of 4
    return not layout.symmetric or (layout.bits == _WIDE and layout.group_size < columns)


def explain(
    layout: WeightLayout | None, shape: tuple[int, int], *, is_table: bool = False
) -> Explanation:
    """What XNNPACK makes of a matrix [rows, columns].

    Args:
        layout: How it is stored in the checkpoint.
        shape: Its rows and columns.
        is_table: Whether it is looked up alone, which any grid allows.
    """
    if layout is None:
        return Explanation(stored="float32")
    if isinstance(layout, CodebookLayout):
        return Explanation(
            stored="float32",
            prices=("of codebooks are stored as dense float32: XNNPACK has no kernel for them",),
        )
    if isinstance(layout, AffineLayout):
        return _explain_affine(layout, shape[1], is_table=is_table)
    stored, price = describe_masked(layout, "XNNPACK")
    plain = layout.without_mask
    found = Explanation()
    if plain is not None:
        found = _explain_affine(plain, shape[1], is_table=is_table)
    return Explanation(stored=stored, refusal=found.refusal, prices=(*found.prices, price))


def _explain_affine(layout: AffineLayout, columns: int, *, is_table: bool) -> Explanation:
    is_row = layout.group_size >= columns
    group = "a row" if is_row else f"g{layout.group_size}"
    stored = f"int{layout.bits} {group}, int8 activations"
    if is_table:
        return Explanation(stored=stored)
    if not is_row and layout.group_size % GROUP_MULTIPLE:
        return Explanation(
            refusal=f"group size {layout.group_size} has no XNNPACK kernel; allowed are multiples "
            f"of {GROUP_MULTIPLE}, or the whole row of {columns}"
        )
    price = (
        "have free zero points, or 8 bits in groups: XNNPACK runs them exactly, at the price of a "
        "second product; symmetric: true, and 8 bits with one scale per row, would do without"
    )
    return Explanation(stored=stored, prices=(price,) if needs_offsets(layout, columns) else ())
