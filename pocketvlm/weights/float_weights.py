"""Float weights, dense or masked: what a stage may still change before codes are chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.nonzeros import FloatNonzeros
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["is_float", "keeps_of", "with_values"]


def is_float(form: WeightForm) -> bool:
    """Whether a weight is stored as floats: dense, or a mask with the values that it keeps."""
    if isinstance(form, SparseWeight):
        return isinstance(form.values, FloatNonzeros)
    return isinstance(form, DenseWeight)


def keeps_of(form: WeightForm) -> Tensor | None:
    """Which elements a masked weight keeps, bool [rows, columns]; `None` where there is no mask."""
    return form.keeps() if isinstance(form, SparseWeight) else None


def with_values(form: WeightForm, values: Tensor) -> WeightForm:
    """Other values in the same kind of float weight: of the same type, under the same mask.

    Args:
        form: A float weight.
        values: [rows, columns]; what lies outside of the mask is not looked at.

    Raises:
        UnsupportedError: A value is too large for a masked weight's float16.
        TypeError: The weight is not stored as floats.
    """
    if isinstance(form, SparseWeight) and is_float(form):
        return SparseWeight.from_form(DenseWeight(values=values.to(torch.float32)), form.keeps())
    if isinstance(form, DenseWeight):
        return DenseWeight(values=values.to(form.values.dtype))
    raise TypeError(f"a weight of kind {form.kind!r} is not stored as floats")
