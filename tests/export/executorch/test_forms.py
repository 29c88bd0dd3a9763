"""What XNNPACK is given is the checkpoint's own weight: its codes and zero points, no new ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.export.executorch.layers import DynamicLinear, TableInteger, pack_nibbles
from pocketvlm.export.executorch.limits import explain, needs_offsets
from pocketvlm.export.executorch.weights import integer_matrix, scale_rounding, signed_codes
from pocketvlm.weights.affine import AffineWeight
from tests.export.rig import quantize_affine

ROW = 96


def make_form(bits: int, group_size: int, kind: str, *, columns: int = ROW) -> AffineWeight:
    form = quantize_affine(torch.randn(6, columns), bits, group_size, symmetric=kind == "symmetric")
    if kind != "float zeros":
        return form
    zeros = (form.zero_points().float() + 0.25).half()
    return AffineWeight.from_codes(
        form.codes(),
        form.scales,
        zeros,
        bits=bits,
        group_size=group_size,
        in_features=columns,
    )


def multiply_slowly(form: AffineWeight, inputs: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Rounded inputs times a weight, in float64, one output at a time."""
    codes, zeros = form.codes().numpy().astype(np.float64), form.zero_points().double().numpy()
    scales = form.scales.double().numpy()
    outputs = np.zeros((len(inputs), form.shape[0]))
    for token, row in enumerate(inputs):
        low, high = min(row.min(), 0.0), max(row.max(), 0.0)
        step = (high - low) / 255
        zero = round(-128 - low / step)
        rounded = [(np.clip(round(x / step) + zero, -128, 127) - zero) * step for x in row]
        for out in range(form.shape[0]):
            outputs[token, out] = bias[out] + math.fsum(
                scales[out, column // form.group_size]
                * (codes[out, column] - zeros[out, column // form.group_size])
                * x
                for column, x in enumerate(rounded)
            )
    return outputs


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([32, 64, 96, 128, 200]),
    kind=st.sampled_from(["symmetric", "asymmetric", "float zeros"]),
    columns=st.sampled_from([64, 70, 96, 160]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=80, deadline=None)
def test_values_are_what_they_were(
    bits: int, group_size: int, kind: str, columns: int, seed: int
) -> None:
    torch.manual_seed(seed)
    form = make_form(bits, group_size, kind, columns=columns)
    matrix = integer_matrix(form)
    half = 1 << (matrix.bits - 1)
    for digit in matrix.digits:
        assert -half <= int(digit.min())
        assert int(digit.max()) < half
    dense, expected = matrix.dequantize(), form.dequantize()
    # A sum of exact products: the last bit of a float32 may differ, a code never does.
    torch.testing.assert_close(dense, expected, rtol=1e-6, atol=1e-6)
    if kind != "float zeros":
        assert matrix.offsets is None or needs_offsets(form.layout, columns)
        assert torch.equal(dense, expected)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (4, 32), (4, ROW), (8, 32), (8, ROW)])
def test_a_layer_computes_what_its_definition_says(bits: int, group_size: int, kind: str) -> None:
    torch.manual_seed(bits)
    form = make_form(bits, group_size, kind)
    inputs, bias = torch.randn(1, 3, ROW), torch.randn(6)
    matrix = integer_matrix(form)
    found = DynamicLinear(matrix, bias)(inputs)[0].numpy()
    expected = multiply_slowly(form, inputs[0].double().numpy(), bias.double().numpy())
    exact = torch.nn.functional.linear(inputs, form.dequantize(), bias)[0].numpy()
    # Offsets take the sums of inputs before rounding, so they may differ by its error, not more.
    rounding = np.abs(expected - exact).max()
    assert np.abs(found - expected).max() <= (1e-4 if matrix.offsets is None else 2 * rounding)
    assert rounding > 1e-4  # or the comparison would say nothing


@pytest.mark.parametrize("columns", [64, 70])
def test_ragged_groups_are_padded(columns: int) -> None:
    form = make_form(4, 32, "symmetric", columns=columns)
    layer = DynamicLinear(integer_matrix(form), None)
    inputs = torch.randn(1, 2, columns)
    exact = torch.nn.functional.linear(inputs, form.dequantize())
    assert float((layer(inputs) - exact).norm() / exact.norm()) < 0.02


def test_nibbles_lie_low_half_first() -> None:
    packed = pack_nibbles(torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8))
    assert packed.tolist() == [[0x0 | 0xF << 4, 0x8 | 0x7 << 4]]


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_table_looks_up_its_rows(bits: int, kind: str) -> None:
    form = make_form(bits, 32, kind)
    ids = torch.tensor([[5, 0, 3, 3]])
    torch.testing.assert_close(TableInteger(form)(ids), form.take_rows(ids), rtol=0, atol=1e-6)
    codes, zeros = signed_codes(form)
    assert codes.dtype == torch.int8
    assert (zeros is None) == (kind == "symmetric" or bits == 2)


def test_groups_without_kernel_are_refused_with_what_works() -> None:
    layout = make_form(4, 48, "symmetric").layout
    assert "group size 48 has no XNNPACK kernel; allowed are multiples of 32" in (
        explain(layout, (6, ROW)).refusal
    )
    # A whole row has a kernel whatever its width, and a table is not multiplied.
    assert explain(layout, (6, 48)).stored == "int4 a row, int8 activations"
    assert explain(layout, (6, ROW), is_table=True).stored == "int4 g48, int8 activations"
    assert not explain(make_form(4, 64, "symmetric").layout, (6, 100)).refusal


def test_scales_lose_what_bfloat16_does_not_hold() -> None:
    form = make_form(4, 32, "symmetric")
    assert 0 < scale_rounding(integer_matrix(form)) < 2**-8
    brain = form.scales.to(torch.bfloat16).half()
    codes = {"bits": 4, "group_size": 32, "in_features": ROW}
    exact = AffineWeight.from_codes(form.codes(), brain, None, **codes)
    assert scale_rounding(integer_matrix(exact)) == 0.0
    assert scale_rounding(integer_matrix(make_form(8, ROW, "symmetric"))) == 0.0
