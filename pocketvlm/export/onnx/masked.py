"""Which bytes of an ONNX file are masked weights: codes of blocks, or floats."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import torch

from pocketvlm.export.onnx.packing import PackedWeight
from pocketvlm.export.sparse_container.pack import MaskedPlace
from pocketvlm.export.sparse_container.unmasked import zero_codes
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.nonzeros import AffineNonzeros
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["masked_codes", "masked_floats"]

_FLOAT_TYPES = {
    onnx.TensorProto.FLOAT: (32, torch.float32),
    onnx.TensorProto.FLOAT16: (16, torch.float16),
    onnx.TensorProto.BFLOAT16: (16, torch.bfloat16),
}


def masked_codes(forms: Sequence[WeightForm], packed: PackedWeight) -> list[MaskedPlace]:
    """The masked ones among weights whose rows were packed behind one another."""
    row_bytes = packed.codes.nbytes // packed.out_features
    places, start = [], 0
    for form in forms:
        if isinstance(form, SparseWeight) and isinstance(form.values, AffineNonzeros):
            places.append(
                MaskedPlace(
                    start=start,
                    form=form,
                    bits=packed.bits,
                    width=row_bytes * 8 // packed.bits,
                    fills=zero_codes(form.values),
                )
            )
        start += form.shape[0] * row_bytes
    return places


def masked_floats(forms: Sequence[WeightForm], data_type: int) -> list[MaskedPlace]:
    """The masked ones among matrices of floats that lie behind one another."""
    bits, table_type = _FLOAT_TYPES[data_type]
    places, start = [], 0
    for form in forms:
        if isinstance(form, SparseWeight):
            places.append(MaskedPlace(start=start, form=form, bits=bits, table_type=table_type))
        start += form.shape[0] * form.shape[1] * bits // 8
    return places
