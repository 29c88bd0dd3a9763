"""Invariants of grids."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.compress.quantization.affine.grid import (
    GRIDS,
    AffineScheme,
    Grid,
    affine_form,
    decode,
    encode,
    group_columns,
    min_max_grid,
)
from pocketvlm.compress.quantization.affine.rtn import round_to_nearest
from pocketvlm.weights.bitpack import pack_codes, unpack_codes
from pocketvlm.weights.dense import DenseWeight

BITS = st.sampled_from([2, 3, 4, 8])


@st.composite
def groups(draw):
    seed = draw(st.integers(0, 10_000))
    size = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(3, 2, size, generator=generator, dtype=torch.float64)
    weights *= 10.0 ** draw(st.integers(-4, 3))
    return weights + draw(st.sampled_from([0.0, 1.0, -3.0]))


@settings(deadline=None)
@given(groups(), BITS, st.booleans())
def test_in_range_weights_move_by_half_a_step_at_most(weights, bits, symmetric):
    grid = min_max_grid(weights, AffineScheme(bits=bits, symmetric=symmetric))
    error = (decode(encode(weights, grid), grid) - weights).abs()
    step = grid.scale[..., None]
    low = (0 - grid.zero[..., None]) * step
    high = ((1 << bits) - 1 - grid.zero[..., None]) * step
    inside = (weights >= low) & (weights <= high)
    assert bool((error <= step * (0.5 + 1e-9))[inside].all())
    # What lies outside does so by the rounding of the scale alone: half a unit in float16's last
    # place, for each of up to 2**bits steps.
    rounding = (1 << bits) * torch.maximum(step * 2**-11, torch.tensor(2.0**-25))
    assert bool((error <= step * (0.5 + 1e-9) + rounding).all())


@settings(deadline=None)
@given(groups(), BITS, st.booleans(), st.sampled_from(list(GRIDS)))
def test_rounding_twice_is_rounding_once(weights, bits, symmetric, kind):
    grid = GRIDS[kind](weights, AffineScheme(bits=bits, symmetric=symmetric))
    codes = encode(weights, grid)
    assert torch.equal(encode(decode(codes, grid), grid), codes)
    assert codes.min() >= 0
    assert codes.max() < 1 << bits
    assert torch.equal(grid.scale, grid.scale.to(torch.float16).to(grid.scale.dtype))
    assert torch.equal(grid.zero, grid.zero.round())


@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([16, 32, 50]), st.booleans())
def test_more_bits_are_never_worse(seed, group_size, symmetric):
    values = torch.randn(8, 100, generator=torch.Generator().manual_seed(seed))
    errors = [
        round_to_nearest(
            DenseWeight(values=values),
            scheme=AffineScheme(bits=bits, symmetric=symmetric),
            group_size=group_size,
        )[1]
        for bits in (2, 3, 4, 8)
    ]
    for fewer, more in pairwise(errors):
        assert more < 0.5 * fewer


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 3e-9, -6e-8, 1e4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_constant_groups_stay_finite_and_close(value, symmetric, bits):
    weight = DenseWeight(values=torch.full((2, 32), value))
    form, _ = round_to_nearest(
        weight, scheme=AffineScheme(bits=bits, symmetric=symmetric), group_size=16
    )
    dense = form.dequantize()
    assert bool(torch.isfinite(dense).all())
    # Half a step of the symmetric grid; the asymmetric one ends at the value itself.
    step = 2 * abs(value) / ((1 << bits) - 1)
    bound = step / 2 if symmetric else 0.0
    assert (dense - value).abs().max() <= bound + abs(value) * 2**-10 + 6e-8


def test_ranges_beyond_float16_are_refused():
    with pytest.raises(ValueError, match="no float16 scale"):
        min_max_grid(torch.tensor([[1e7, -1e7]]), AffineScheme(bits=2, symmetric=False))


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 33), BITS, st.booleans(), st.integers(0, 99))
def test_the_stored_form_says_what_the_grid_says(columns, group_size, bits, symmetric, seed):
    weights = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    grouped = group_columns(weights, group_size)
    grid = min_max_grid(grouped, AffineScheme(bits=bits, symmetric=symmetric))
    codes = encode(grouped, grid)
    form = affine_form(codes.view(3, -1), grid, group_size=group_size, in_features=columns)
    assert torch.equal(form.dequantize(), decode(codes, grid).view(3, -1)[:, :columns])
    padding = form.codes()[:, columns:]
    assert bool((padding == form.zero_points()[:, -1:]).all())


@settings(deadline=None)
@given(st.integers(0, 20), st.sampled_from([1, 2, 3, 4, 5, 8]), st.integers(0, 99))
def test_packing_every_width_is_undone(count, bits, seed):
    values = torch.randint(0, 1 << bits, (3, count), generator=torch.Generator().manual_seed(seed))
    codes = values.to(torch.uint8).numpy()
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, -(-count * bits // 8))
    assert (unpack_codes(packed, bits, count) == codes).all()


def test_grid_search_prefers_the_wider_grid_on_ties():
    grid: Grid = GRIDS["mse"](torch.zeros(1, 4), AffineScheme(bits=4, symmetric=False))
    assert float(grid.scale[0]) == 1.0


@settings(deadline=None)
@given(groups(), BITS)
def test_a_restricted_grid_reaches_as_far_with_a_finer_step(weights, bits):
    scheme = AffineScheme(bits=bits, symmetric=True, restricted=True)
    grid = min_max_grid(weights, scheme)
    codes = encode(weights, grid)
    assert codes.min() >= 1
    full = min_max_grid(weights, AffineScheme(bits=bits, symmetric=True))
    # The same weights on fewer codes: a step is larger by one part in the number of steps.
    ratio = ((1 << bits) - 1) / ((1 << bits) - 2)
    largest = weights.abs().amax(dim=-1)
    wide = largest > 0.1
    assert torch.allclose(grid.scale[wide], full.scale[wide] * ratio, rtol=2e-3)
    # Both ends are reached exactly, up to the rounding of the scale to float16.
    reach = ((1 << (bits - 1)) - 1) * grid.scale
    assert torch.allclose(reach[wide], largest[wide], rtol=2e-3)


@settings(deadline=None)
@given(groups(), BITS)
def test_float_zeros_round_no_worse_than_half_a_step(weights, bits):
    grid = min_max_grid(weights, AffineScheme(bits=bits, float_zeros=True))
    assert torch.equal(grid.zero, grid.zero.to(torch.float16).to(grid.zero.dtype))
    error = (decode(encode(weights, grid), grid) - weights).abs()
    # A scale in float16's subnormal range is off by up to 2**-25, and so is every step of a code.
    slack = weights.abs().amax(dim=-1, keepdim=True) * 0.02 + (1 << bits) * 2.0**-25 + 1e-6
    assert bool((error <= grid.scale[..., None] / 2 + slack).all())


def test_float_zeros_serve_a_group_far_from_zero():
    weights = torch.linspace(1.0, 1.3, 16, dtype=torch.float64)[None]
    errors = [
        (decode(encode(weights, grid), grid) - weights).abs().max()
        for grid in (
            min_max_grid(weights, AffineScheme(bits=3)),
            min_max_grid(weights, AffineScheme(bits=3, float_zeros=True)),
        )
    ]
    assert errors[1] < 0.3 * errors[0]
