"""What a target says that a layer takes is what its packers write, for every kind of layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocketvlm.export.coreml.constexpr import Codes, Constexpr
from pocketvlm.export.coreml.forms import pack_form
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.export.executorch.forms import integer_matrix
from pocketvlm.export.executorch.target import ToExecutorch
from pocketvlm.export.onnx.codebook import codebook_rows
from pocketvlm.export.onnx.packing import narrowest_float, pack_weight
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.export.onnx.writer import GraphWriter, WeightFile
from pocketvlm.export.sparse_container.pack import MaskedPlace
from pocketvlm.export.sparse_container.unmasked import unmasked
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.codebook import CodebookWeight, Lookup
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, SparseLayout, WeightLayout
from pocketvlm.weights.sparse import SparseWeight

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


def make_weight(layout: WeightLayout | None) -> WeightForm:
    """A random weight with a layout."""
    random = torch.Generator().manual_seed(0)
    if layout is None:
        values = torch.randn(_SHAPE, generator=random)
        return DenseWeight(values=values.bfloat16())
    if isinstance(layout, SparseLayout):
        keeps = torch.zeros(_ROWS * _COLUMNS, dtype=torch.bool)
        keeps[torch.randperm(len(keeps), generator=random)[: len(keeps) // 2]] = True
        plain = make_weight(layout.values)
        if layout.values is None:
            plain = DenseWeight(values=torch.randn(_SHAPE, generator=random).half())
        return SparseWeight.from_form(plain, keeps.view(_SHAPE))
    if isinstance(layout, CodebookLayout):
        entries, length = 1 << layout.index_bits, layout.vector_length
        indices = torch.randint(entries, (_ROWS // length, _COLUMNS), generator=random)
        tables = torch.randn(1, 1, entries, length, generator=random).half()
        scales = torch.rand(_ROWS, generator=random).half() if layout.row_scales else None
        lookup = Lookup.from_indices(indices.to(torch.uint8), tables, index_bits=layout.index_bits)
        return CodebookWeight(main=lookup, row_scales=scales)
    groups = -(-_COLUMNS // layout.group_size)
    top = 1 << layout.bits
    zeros = None
    if layout.float_zeros:
        zeros = (torch.rand(_ROWS, groups, generator=random) * (top - 1) + 0.25).half()
    elif not layout.symmetric:
        zeros = torch.randint(0, top, (_ROWS, groups), generator=random)
    return AffineWeight.from_codes(
        torch.randint(0, top, (_ROWS, groups * layout.group_size), generator=random),
        (torch.rand(_ROWS, groups, generator=random) + 0.5).half(),
        zeros,
        bits=layout.bits,
        group_size=layout.group_size,
        in_features=_COLUMNS,
    )


class CountedFile(WeightFile):
    """A weight file that sums what it is given, without padding."""

    total = 0

    def store(self, data: bytes, masked: Sequence[MaskedPlace] = ()) -> tuple[int, int]:
        self.total += len(data)
        return super().store(data, masked)


def onnx_bytes(form: WeightForm, folder: Path) -> int:
    plain = unmasked(form)
    if isinstance(plain, AffineWeight):
        packed = pack_weight("layer", [plain])
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
    plain = unmasked(form)
    if not isinstance(plain, AffineWeight):
        return plain.dequantize().numel() * 4
    matrix = integer_matrix("layer", plain)
    codes = sum(digit.numel() for digit in matrix.digits) * matrix.bits // 8
    scales = matrix.scales.numel() * (4 if matrix.is_row else 2 * len(matrix.digits))
    return codes + scales + (0 if matrix.offsets is None else matrix.offsets.numel() * 4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_onnx(layout: WeightLayout | None, tmp_path: Path) -> None:
    form = make_weight(layout)
    assert ToOnnx().layer_bytes(layout, form.shape) == onnx_bytes(form, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_coreml(layout: WeightLayout | None) -> None:
    form = make_weight(layout)
    packed = pack_form("layer", form, deployment="iOS18", float_type=np.float16)
    assert ToCoreml().layer_bytes(layout, form.shape) == coreml_bytes(packed)


@pytest.mark.parametrize(
    "layout",
    [layout for layout in LAYOUTS if getattr(layout, "group_size", 32) % 32 == 0],
    ids=str,
)
def test_executorch(layout: WeightLayout | None) -> None:
    form = make_weight(layout)
    assert ToExecutorch().layer_bytes(layout, form.shape) == executorch_bytes(form)
