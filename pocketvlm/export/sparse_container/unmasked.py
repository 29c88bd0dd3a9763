"""What a masked weight is where a runtime has kernels for whole matrices alone.

A grid of integers that has an exact zero keeps its codes: what the mask dropped gets the code of
zero, and the layer runs on the runtime's own integer kernel. Nothing is quantized again. Everything
else becomes the float matrix that the form means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.layout import AffineLayout, SparseLayout, WeightLayout
from pocketvlm.weights.nonzeros import AffineNonzeros
from pocketvlm.weights.sparse import SparseWeight

__all__ = [
    "describe_unmasked",
    "has_zero_code",
    "planned_unmasked",
    "unmasked",
    "unmasked_notes",
    "zero_codes",
]


def has_zero_code(form: WeightForm) -> bool:
    """Whether a masked weight is stored as integers of which one means exactly zero."""
    return (
        isinstance(form, SparseWeight)
        and isinstance(form.values, AffineNonzeros)
        and form.values.has_zero_code
    )


def unmasked(form: WeightForm) -> WeightForm:
    """The same matrix without a mask; forms that have none are returned as they are.

    Returns:
        `AffineWeight` with the very codes of the kept elements, and the zero point elsewhere; or
        `DenseWeight` in float32 where the form is stored as floats or indices, or where no code of
        its grid means zero.
    """
    if not isinstance(form, SparseWeight):
        return form
    values = form.values
    if not isinstance(values, AffineNonzeros) or not has_zero_code(form):
        return DenseWeight(values=form.dequantize())
    rows, columns = form.shape
    width = values.scales.shape[1] * values.group_size
    codes = zero_codes(values).repeat_interleave(values.group_size, dim=1)
    codes[:, :columns][form.keeps()] = form.stored()
    return AffineWeight.from_codes(
        codes.view(rows, width),
        values.scales,
        values.zeros,
        bits=values.bits,
        group_size=values.group_size,
        in_features=columns,
    )


def planned_unmasked(form: WeightLayout | None) -> WeightLayout | None:
    """The plan of what `unmasked` returns; `None` for floats.

    Zero points that are integers are taken for codes, which is what every quantizer here chooses.
    """
    if not isinstance(form, SparseLayout):
        return form
    values = form.values
    return values if isinstance(values, AffineLayout) and not values.float_zeros else None


def describe_unmasked(form: SparseWeight, *, wide: str, is_packed: bool) -> str:
    """How a masked weight is stored, in a few words for the manifest.

    Args:
        form: The weight.
        wide: What the target calls its floats.
        is_packed: Whether the bundle's file holds what is kept alone.
    """
    where = "packed in the file" if is_packed else "stored dense"
    values = form.values
    if not isinstance(values, AffineNonzeros) or not has_zero_code(form):
        return f"masked {wide}, {where}"
    grid = "symmetric" if values.zeros is None else "asymmetric"
    return f"masked int{values.bits} g{values.group_size} {grid}, {where}"


def unmasked_notes(forms: Iterable[WeightForm]) -> tuple[str, ...]:
    """What became of masked weights, and what it does not bring, for the report."""
    kinds: Counter[str] = Counter()
    for form in forms:
        if isinstance(form, SparseWeight):
            integers = isinstance(form.values, AffineNonzeros)
            kinds["codes" if has_zero_code(form) else "grid" if integers else "floats"] += 1
    says = {
        "codes": "integers, whose masked codes are their zero point",
        "grid": "floats, since no code of their grid means zero",
        "floats": "floats, since no kernel reads masked floats or tables",
    }
    return tuple(
        f"{kinds[kind]} masked layers are multiplied as dense {what}: zeros save no time"
        for kind, what in says.items()
        if kinds[kind]
    )


def zero_codes(values: AffineNonzeros) -> Tensor:
    """The codes that mean zero of a grid that has them, uint8 [rows, groups]."""
    if values.zeros is not None:
        return values.zeros
    return torch.full(values.scales.shape, 1 << (values.bits - 1), dtype=torch.uint8)
