"""What Core ML expands is what the weight form says, whichever operators it takes."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.errors import UnsupportedError
from pocketvlm.export.coreml.constexpr import Codes, Constexpr, narrow_float
from pocketvlm.export.coreml.limits import container_bits
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.export.coreml.weights import pack_weight
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.codebook import CodebookWeight, Lookup
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from tests.export.rig import quantize_affine

Operand = Codes | np.ndarray | int | Constexpr


def expand(operand: Operand) -> np.ndarray:
    """The definitions of the operators, element by element, in float64."""
    if isinstance(operand, Codes):
        assert operand.values.size == 0 or int(operand.values.max()) < 1 << operand.bits
        return operand.values.astype(np.int64)
    if not isinstance(operand, Constexpr):
        return np.asarray(operand)
    inner = {name: expand(value) for name, value in operand.operands.items()}
    result = _EXPAND[operand.operator](**inner)
    assert result.shape == operand.shape
    return result


def _shift_scale(
    data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None
) -> np.ndarray:
    result = np.zeros(data.shape, np.float64)
    block = [data.shape[axis] // scale.shape[axis] for axis in (0, 1)]
    for row in range(data.shape[0]):
        for column in range(data.shape[1]):
            place = (row // block[0], column // block[1])
            shift = 0 if offset is None else float(offset[place])
            result[row, column] = float(scale[place]) * (float(data[row, column]) - shift)
    return result


def _look_up(
    indices: np.ndarray,
    lut: np.ndarray,
    vector_axis: np.ndarray | None = None,
    shape: np.ndarray | None = None,
) -> np.ndarray:
    if shape is not None:
        rows, columns = (int(size) for size in shape)
        bits = int(np.log2(lut.size))
        plain = np.zeros(rows * columns, np.int64)
        for index in range(plain.size):
            for bit in range(bits):
                place = index * bits + bit
                plain[index] |= ((int(indices[place // 8]) >> (place % 8)) & 1) << bit
        return lut.astype(np.float64)[plain].reshape(rows, columns)
    assert vector_axis is None or vector_axis == 0
    length = lut.shape[-1]
    result = np.zeros((indices.shape[0] * length, indices.shape[1]), np.float64)
    block = [indices.shape[axis] // lut.shape[axis] for axis in (0, 1)]
    for row in range(indices.shape[0]):
        for column in range(indices.shape[1]):
            table = lut[row // block[0], column // block[1]]
            result[row * length : (row + 1) * length, column] = table[indices[row, column]]
    return result


def _dequantize(
    quantized_data: np.ndarray, zero_point: np.ndarray, scale: np.ndarray, axis: np.ndarray
) -> np.ndarray:
    assert axis == 0
    shifted = quantized_data.astype(np.float64) - zero_point.astype(np.float64)[:, None]
    return shifted * scale.astype(np.float64)[:, None]


_EXPAND = {
    "constexpr_blockwise_shift_scale": _shift_scale,
    "constexpr_lut_to_dense": _look_up,
    "constexpr_affine_dequantize": _dequantize,
}


def make_codebook(
    rows: int,
    columns: int,
    *,
    bits: int,
    length: int = 1,
    groups: tuple[int, int] = (1, 1),
    scaled: bool = False,
    seed: int = 0,
) -> CodebookWeight:
    generator = torch.Generator().manual_seed(seed)
    entries = (1 << bits) - 1  # one less than fits: tables are filled up
    indices = torch.randint(entries, (rows // length, columns), generator=generator)
    codebooks = torch.randn(*groups, entries, length, generator=generator).half()
    scales = torch.rand(rows, generator=generator).half() if scaled else None
    lookup = Lookup.from_indices(indices.to(torch.uint8), codebooks, index_bits=bits)
    return CodebookWeight(main=lookup, row_scales=scales)


def check(form: WeightForm, deployment: str = "iOS18") -> Constexpr:
    packed = pack_weight("layer", form, deployment=deployment, float_type=np.float16)
    assert isinstance(packed, Constexpr)
    expected = form.dequantize().double().numpy()
    expanded = expand(packed)
    np.testing.assert_allclose(expanded[:, : expected.shape[1]], expected, rtol=1e-6, atol=0)
    return packed


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([8, 16, 32, 1000]),
    rows=st.integers(1, 6),
    columns=st.integers(1, 70),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_affine(
    bits: int, group_size: int, rows: int, columns: int, symmetric: bool, seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    form = quantize_affine(weight, bits, group_size, symmetric=symmetric)
    packed = check(form)
    # No offsets are stored where they are implied, and a row of one group is not padded.
    assert ("offset" in packed.operands) == (not symmetric)
    assert packed.shape[1] == (columns if form.groups == 1 else form.groups * group_size)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_between_codes(bits: int) -> None:
    form = quantize_affine(torch.randn(6, 64), bits, 32)
    zeros = form.zeros.to(torch.float16) + 0.25
    form = AffineWeight.from_codes(
        form.codes(), form.scales, zeros, bits=bits, group_size=32, in_features=64
    )
    assert form.has_float_zeros
    check(form)
    row = quantize_affine(torch.randn(6, 32), 8, 32)
    check(replace(row, zeros=row.zeros.to(torch.float16) + 0.25), "iOS17")


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("groups", [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("scaled", [False, True])
def test_codebooks(bits: int, length: int, groups: tuple[int, int], scaled: bool) -> None:
    form = make_codebook(24, 10, bits=bits, length=length, groups=groups, scaled=scaled)
    packed = check(form)
    assert (packed.operator == "constexpr_lut_to_dense") == (not scaled)
    inner = packed.operands["data"] if scaled else packed
    assert isinstance(inner, Constexpr)
    indices = inner.operands["indices"]
    assert isinstance(indices, Codes)
    assert indices.bits == container_bits(bits, "iOS18")


def test_rows_for_ios17() -> None:
    packed = check(quantize_affine(torch.randn(7, 40), 8, 40), "iOS17")
    assert packed.operator == "constexpr_affine_dequantize"


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_tables_for_ios17(bits: int) -> None:
    check(make_codebook(7, 11, bits=bits), "iOS17")


@pytest.mark.parametrize(
    ("form", "deployment", "message"),
    [
        (quantize_affine(torch.randn(4, 64), 4, 32), "iOS17", "need iOS 18.*group_size: row"),
        (quantize_affine(torch.randn(4, 64), 8, 32), "iOS17", "need iOS 18"),
        (make_codebook(8, 4, bits=4, length=4), "iOS17", "need iOS 18"),
        (make_codebook(8, 4, bits=4, scaled=True), "iOS17", "need iOS 18"),
    ],
    ids=["int4", "groups", "vectors", "scales"],
)
def test_forms_that_are_too_new(form: WeightForm, deployment: str, message: str) -> None:
    refusal = ToCoreml(deployment=deployment).explain(form.layout, form.shape).refusal
    assert re.search(message, refusal)
    assert not ToCoreml().explain(form.layout, form.shape).refusal


def test_what_a_look_up_has_no_place_for() -> None:
    plain = make_codebook(8, 6, bits=4)
    wide = Lookup.from_indices(
        torch.zeros(8, 6, dtype=torch.int64), torch.zeros(1, 1, 512, 1).half(), index_bits=9
    )
    cases = {
        "residual": CodebookWeight(main=plain.main, residual=plain.main),
        "outlier": CodebookWeight(main=plain.main, outliers=plain.main),
        "scales of columns": CodebookWeight(main=plain.main, column_scales=torch.ones(6).half()),
        "another order": CodebookWeight(main=plain.main, order=torch.arange(6).flip(0).int()),
        "at most 8 bits": CodebookWeight(main=wide),
    }
    for message, form in cases.items():
        assert message in ToCoreml().explain(form.layout, form.shape).refusal


def test_floats_that_float16_cannot_hold() -> None:
    values = torch.tensor([[1.0, 7e4]])
    with pytest.raises(UnsupportedError, match=r"layer: has a value of 7e\+04.*float32"):
        narrow_float("layer", values, np.float16)
    assert narrow_float("layer", values, np.float32).tolist() == values.tolist()


@pytest.mark.parametrize(
    ("form", "stored"),
    [
        (quantize_affine(torch.randn(4, 64), 4, 32), "int4 g32 asymmetric"),
        (DenseWeight(values=torch.zeros(2, 2)), "float16"),
        (
            make_codebook(8, 4, bits=5, length=4, groups=(2, 1)),
            "lut 5-bit indices of vectors of 4, 2 tables",
        ),
    ],
    ids=["int4", "float", "lut"],
)
def test_descriptions(form: WeightForm, stored: str) -> None:
    assert ToCoreml().explain(form.layout, form.shape).stored == stored
