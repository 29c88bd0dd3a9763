"""What a target says that a layer takes is what its packers write, for every kind of layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketvlm.export.coreml.constexpr import Codes, Constexpr
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.export.coreml.weights import pack_weight as pack_weight_coreml
from pocketvlm.export.executorch.target import ToExecutorch
from pocketvlm.export.executorch.weights import integer_matrix
from pocketvlm.export.onnx.byte_rows import byte_codes
from pocketvlm.export.onnx.expansion import codebook_rows
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.export.onnx.weights import narrowest_float, pack_weight
from pocketvlm.export.onnx.writer import GraphWriter, WeightFile
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.codebook import CodebookWeight
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, SparseLayout, WeightLayout
from tests.weights.random_weights import random_weight

_ROWS, _COLUMNS = 1024, 320
_SHAPE = (_ROWS, _COLUMNS)
_LEAST_STORED = 10  # coremltools keeps shorter arrays in the graph


def affine(bits: int, group_size: int, zeros: str) -> AffineLayout:
    return AffineLayout(
        bits=bits, group_size=group_size, symmetric=zeros == "none", float_zeros=zeros == "float"
    )


INTEGERS = [
    *(affine(bits, 32, zeros) for bits in (2, 3, 4, 8) for zeros in ("none", "integer")),
    affine(2, 32, "float"),
    affine(2, 16, "float"),
    affine(4, 64, "float"),
    affine(4, 16, "integer"),
    affine(4, 128, "integer"),
    affine(8, _COLUMNS, "none"),
]
TABLES = [
    CodebookLayout(index_bits=8, vector_length=4),
    CodebookLayout(index_bits=8, vector_length=4, row_scales=True),
]
MASKED = [
    SparseLayout(density=0.5),
    SparseLayout(density=0.5, values=affine(4, 32, "integer")),
    SparseLayout(density=0.5, values=affine(4, 32, "none")),
    SparseLayout(density=0.5, values=affine(2, 32, "float")),
    SparseLayout(
        density=0.5, values=CodebookLayout(index_bits=8, vector_length=1, row_scales=True)
    ),
]
LAYOUTS: list[WeightLayout | None] = [None, *INTEGERS, *TABLES, *MASKED]


class CountedFile(WeightFile):
    """A weight file that sums what it is given, without padding."""

    total = 0

    def store(self, data: bytes) -> tuple[int, int]:
        self.total += len(data)
        return super().store(data)


def onnx_bytes(form: WeightForm, folder: Path) -> int:
    plain = form.without_mask()
    if isinstance(plain, AffineWeight):
        if plain.layout.has_byte_rows(plain.in_features):
            return byte_codes([plain]).nbytes + plain.scales.numpy().nbytes
        packed = pack_weight([plain])
        zeros = 0 if packed.zeros is None else packed.zeros.nbytes
        return packed.codes.nbytes + packed.scales.nbytes + zeros
    if isinstance(plain, CodebookWeight):
        with CountedFile(folder / "weights.bin") as weights:
            codebook_rows(GraphWriter("rows", weights, opset=18), "layer", plain, "ids")
            return weights.total
    assert isinstance(plain, DenseWeight)
    return narrowest_float(plain.values)[0].nbytes


def coreml_bytes(packed: Any) -> int:
    """Arrays with their records of 64 bytes, padded to 64; numbers lie in the graph."""
    if isinstance(packed, Constexpr):
        source = 0 if packed.source is None else coreml_bytes(packed.source)
        return source + sum(map(coreml_bytes, packed.operands.values()))
    if isinstance(packed, int):
        return 0
    bits = packed.bits if isinstance(packed, Codes) else packed.itemsize * 8
    count = packed.values.size if isinstance(packed, Codes) else packed.size
    if count < _LEAST_STORED:
        return 0
    return 64 + math.ceil(count * bits / 8 / 64) * 64


def executorch_bytes(form: WeightForm) -> int:
    plain = form.without_mask()
    if not isinstance(plain, AffineWeight):
        return plain.dequantize().numel() * 4
    matrix = integer_matrix(plain)
    codes = sum(digit.numel() for digit in matrix.digits) * matrix.bits // 8
    scales = matrix.scales.numel() * (4 if matrix.is_row else 2 * len(matrix.digits))
    return codes + scales + (0 if matrix.offsets is None else matrix.offsets.numel() * 4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_onnx(layout: WeightLayout | None, tmp_path: Path) -> None:
    form = random_weight(layout, _SHAPE)
    assert form.layout == layout
    assert ToOnnx().layer_bytes(layout, form.shape) == onnx_bytes(form, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_coreml(layout: WeightLayout | None) -> None:
    form = random_weight(layout, _SHAPE)
    packed = pack_weight_coreml("layer", form, deployment="iOS18", float_type=np.float16)
    assert ToCoreml().layer_bytes(layout, form.shape) == coreml_bytes(packed)


@pytest.mark.parametrize(
    "layout",
    [layout for layout in LAYOUTS if getattr(layout, "group_size", 32) % 32 == 0],
    ids=str,
)
def test_executorch(layout: WeightLayout | None) -> None:
    form = random_weight(layout, _SHAPE)
    assert ToExecutorch().layer_bytes(layout, form.shape) == executorch_bytes(form)
