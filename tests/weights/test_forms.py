from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.bitpack import pack_codes, unpack_codes
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.modules import FormEmbedding, FormLinear, cache_dense_weights


def pack_slowly(row: list[int], bits: int) -> list[int]:
    """One big integer, lowest code first, cut into bytes."""
    number = sum(code << (bits * index) for index, code in enumerate(row))
    return list(number.to_bytes(-(-len(row) * bits // 8), "little"))


@given(bits=st.integers(1, 8), data=st.data())
def test_packing_agrees_with_big_integers_and_round_trips(bits, data):
    rows = data.draw(
        st.integers(1, 40).flatmap(
            lambda n: st.lists(
                st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n),
                min_size=1,
                max_size=4,
            )
        )
    )
    codes = np.array(rows, dtype=np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.tolist() == [pack_slowly(row, bits) for row in rows]
    assert np.array_equal(unpack_codes(packed, bits, codes.shape[-1]), codes)


def test_packing_refuses_a_code_that_is_too_large():
    with pytest.raises(ValueError, match="a code of 16 does not fit into 4 bits"):
        pack_codes(np.array([[16]]), 4)


def random_affine(rows, columns, bits, group_size, *, symmetric, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (rows, groups * group_size), generator=generator)
    scales = (torch.rand(rows, groups, generator=generator) + 0.01).half()
    zeros = None if symmetric else torch.randint(0, 2**bits, (rows, groups), generator=generator)
    form = AffineWeight.from_codes(
        codes, scales, zeros, bits=bits, group_size=group_size, in_features=columns
    )
    return form, codes, scales, zeros


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [32, 40])
def test_dequantize_is_scale_times_code_minus_zero(bits, symmetric, columns):
    form, codes, scales, zeros = random_affine(3, columns, bits, 16, symmetric=symmetric)
    dense = form.dequantize()
    for row in range(3):
        for column in range(columns):
            group = column // 16
            zero = 2 ** (bits - 1) if zeros is None else int(zeros[row, group])
            expected = float(scales[row, group]) * (int(codes[row, column]) - zero)
            assert float(dense[row, column]) == pytest.approx(expected, rel=1e-6)


def test_taking_rows_equals_indexing_the_dense_matrix():
    form, *_ = random_affine(7, 40, 4, 16, symmetric=False)
    rows = torch.tensor([[0, 6], [3, 3]])
    assert torch.equal(form.take_rows(rows), form.dequantize()[rows])
    none = rows[:, :0]  # as between two tiles that follow each other
    assert torch.equal(form.take_rows(none), form.dequantize()[none])


@pytest.mark.parametrize("symmetric", [True, False])
def test_forms_round_trip_through_tensors(symmetric):
    form, *_ = random_affine(5, 40, 3, 16, symmetric=symmetric)
    again = AffineWeight.from_tensors(form.to_tensors(), form.to_metadata())
    assert torch.equal(again.dequantize(), form.dequantize())
    assert again.stored_bytes == form.stored_bytes


def test_stored_bytes_count_codes_scales_and_zeros():
    form, *_ = random_affine(8, 64, 4, 32, symmetric=False)
    assert form.stored_bytes == 8 * 64 // 2 + 8 * 2 * 2 + 8 * 2
    assert form.bits_per_weight == form.stored_bytes * 8 / (8 * 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits must be 2, 3, 4 or 8"),
        ({"group_size": 8}, "do not cover"),
        ({"scales": torch.ones(5, 3)}, "not torch.float16"),
        ({"zeros": torch.zeros(5, 2, dtype=torch.uint8)}, "zero points need the shape"),
        ({"zeros": torch.full((5, 3), 16, dtype=torch.uint8)}, "16 is not a code of 4 bits"),
    ],
)
def test_inconsistent_forms_are_refused(changes, message):
    form, *_ = random_affine(5, 40, 4, 16, symmetric=True)
    fields = {
        "packed": form.packed,
        "scales": form.scales,
        "zeros": None,
        "bits": 4,
        "group_size": 16,
        "in_features": 40,
    }
    with pytest.raises(ValueError, match=message):
        AffineWeight(**{**fields, **changes})


def test_layers_compute_with_the_dequantized_weight_inside_and_outside_of_the_cache():
    form, *_ = random_affine(6, 40, 4, 16, symmetric=False)
    bias = torch.arange(6.0)
    linear, embedding = FormLinear(form, bias), FormEmbedding(form)
    model = torch.nn.ModuleList([linear, embedding])
    inputs, rows = torch.randn(2, 40), torch.tensor([1, 5])
    expected = inputs @ form.dequantize().T + bias
    torch.testing.assert_close(linear(inputs), expected)
    with cache_dense_weights(model):
        assert linear.cached is embedding.cached
        torch.testing.assert_close(linear(inputs), expected)
        assert torch.equal(embedding(rows), form.dequantize()[rows])
    assert linear.cached is None


def test_dense_weights_widen_on_use():
    values = torch.randn(3, 4).bfloat16()
    form = DenseWeight(values=values)
    assert form.dequantize().dtype == torch.float32
    assert form.stored_bytes == 3 * 4 * 2
