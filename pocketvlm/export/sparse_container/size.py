"""Predicts what packing a masked weight saves, by the very description that the file would hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pocketvlm.export.sparse_container.pack import CHOICES
from pocketvlm.export.sparse_container.unmasked import planned_unmasked
from pocketvlm.runtime.sparse_span import MaskedSpan
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, SparseLayout, WeightLayout

__all__ = ["masked_warnings", "saved_bytes"]

_BYTE = 8
_WORD = 32
_SPAN_BYTES = 150  # of the document, for a matrix and for what lies behind it; measured


def saved_bytes(
    form: SparseLayout,
    shape: tuple[int, int],
    *,
    bits: int,
    width: int | None = None,
    copies: int = 1,
    has_fills: bool = False,
) -> int:
    """Bytes that a packed file is smaller by.

    Args:
        form: What the matrix will be.
        shape: Its rows and columns.
        bits: Width of an element in the file that is packed.
        width: Elements that a row has there; `None` for the layer's columns.
        copies: Matrices of these elements that share the mask, such as the digits of a code.
        has_fills: Whether every row and group has a zero of its own.
    """
    rows, columns = shape
    layout: dict[str, Any] = {}
    values = form.values
    if isinstance(values, AffineLayout) and has_fills:
        layout["group"] = min(values.group_size, width or columns)
    elif isinstance(values, CodebookLayout) and (bits == _WORD or not values.row_scales):
        layout["tables"] = (values.index_bits, values.row_groups, 1 << values.index_bits)
        layout["row_scales"] = values.row_scales
    elif values is None and bits == _WORD:
        layout["is_half"] = True
    width = width or columns
    width += -width % max(1, _BYTE // bits)  # a row of the file begins with a byte
    span = MaskedSpan(
        rows=rows,
        columns=columns,
        width=width,
        bits=bits,
        kept=form.kept(rows, columns),
        **layout,
        **_mask_layout(form, rows, columns),
    )
    packed = copies * (sum(span.sections) + _SPAN_BYTES) - (copies - 1) * span.mask_bytes
    return max(0, copies * span.whole_bytes - packed)


def _mask_layout(form: SparseLayout, rows: int, columns: int) -> dict[str, Any]:
    """How `sparse_file.pack_file` will find the mask to be."""
    high, wide = form.block
    if high * wide > 1 and rows % high == 0 and columns % wide == 0:
        return {"block": form.block}
    if form.choice is not None and form.choice[1] in CHOICES:
        return {"choice": form.choice}
    return {}


def masked_warnings(
    target: str, engine: str, forms: Iterable[WeightLayout | None], *, sparse_file: bool
) -> Iterator[str]:
    """What a target without kernels for masked weights says of them.

    Args:
        target: Its name.
        engine: What runs its bundles.
        forms: Every layer's.
        sparse_file: Whether they are packed in the file.
    """
    masked = [form for form in forms if isinstance(form, SparseLayout)]
    where = (
        "packed in the file and dense once loaded, which takes time at every start"
        if sparse_file
        else "stored dense; sparse_file: true would pack them in the file"
    )
    integers = sum(planned_unmasked(form) is not None for form in masked)
    for count, kind in ((integers, "integers"), (len(masked) - integers, "floats")):
        if count:
            yield (
                f"{target}: {count} masked layers are {kind} and {where}: {engine} has no kernel "
                "that saves time by zeros"
            )
    if sparse_file and not masked:
        yield f"{target}: sparse_file packs nothing: no stage masks weights"
