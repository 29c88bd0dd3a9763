"""GPTQ's kernel against a second, plain implementation, and against what it must never do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pocketvlm.compress.layerwise.error_feedback import (
    factorize,
    order_columns,
)
from pocketvlm.compress.quantization.affine.gptq import quantize_affine
from pocketvlm.compress.quantization.affine.grid import (
    AffineScheme,
    decode,
    encode,
    group_columns,
    min_max_grid,
    mse_grid,
)
from tests.compress import textbook


def problem(rows, columns, *, seed=0, dead=(), tokens=400):
    """A weight and the second moment of strongly correlated inputs."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(columns, columns)) / columns**0.5
    X = rng.normal(size=(tokens, columns)) @ mixing * np.exp(rng.normal(size=columns))
    X += 0.5 * rng.normal(size=(tokens, 1))
    X[:, list(dead)] = 0
    W = rng.normal(size=(rows, columns)) * np.exp(0.5 * rng.normal(size=columns))
    return W, X.T @ X / tokens


def quantize(W, factor, *, bits, symmetric, **options):
    scheme = AffineScheme(bits=bits, symmetric=symmetric)
    return quantize_affine(torch.from_numpy(W), factor, scheme, **options)


def ours(W, H, *, order="natural", damping=0.01, group_size, **options):
    factor = factorize(torch.from_numpy(H), group_size=group_size, damping=damping, order=order)
    codes, grid = quantize(W, factor, group_size=group_size, **options)
    return codes.numpy(), grid.scale.numpy(), grid.zero.numpy()


def output_loss(W, H, codes, scales, zeros, group_size):
    dense = (codes - np.repeat(zeros, group_size, 1)) * np.repeat(scales, group_size, 1)
    D = dense[:, : W.shape[1]] - W
    return np.einsum("ri,ij,rj->", D, H, D)


@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("order", ["natural", "group_aware"])
@pytest.mark.parametrize(
    ("columns", "group_size"),
    [
        (96, 16),  # groups narrower than a block of lazy updates
        (200, 32),  # a ragged last group, and blocks that end at group borders
        (200, 24),  # a block of 120 columns
        (300, 160),  # groups wider than a block
        (150, 150),  # one scale per row
        (130, 128),
        (7, 3),
        (5, 1),
    ],
)
def test_agrees_with_the_textbook_on_every_code(
    columns, group_size, order, symmetric, static_groups
):
    W, H = problem(6, columns, seed=columns + group_size, dead=(1, 3))
    options = {"bits": 3, "group_size": group_size, "symmetric": symmetric, "order": order}
    expected = textbook.textbook_gptq(W, H, static_groups=static_groups, **options)
    found = ours(W, H, static_groups=static_groups, **options)
    for name, mine, theirs in zip(("codes", "scales", "zeros"), found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_agrees_with_the_textbook_at_every_width(bits):
    W, H = problem(8, 64, seed=bits)
    options = {"bits": bits, "group_size": 32, "symmetric": False, "order": "group_aware"}
    for mine, theirs in zip(
        ours(W, H, **options), textbook.textbook_gptq(W, H, **options), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_loses_less_output_than_rounding(bits, symmetric):
    W, H = problem(32, 128, seed=bits)
    groups = group_columns(torch.from_numpy(W), 32)
    grid = min_max_grid(groups, AffineScheme(bits=bits, symmetric=symmetric))
    rounded = encode(groups, grid).reshape(32, -1).numpy()
    loss_rounded = output_loss(W, H, rounded, grid.scale.numpy(), grid.zero.numpy(), 32)
    fitted = ours(W, H, bits=bits, group_size=32, symmetric=symmetric, order="group_aware")
    assert output_loss(W, H, *fitted, 32) < 0.75 * loss_rounded
    # What the order is for: from left to right, the strongest columns find nobody to make up for
    # their errors.
    natural = ours(W, H, bits=bits, group_size=32, symmetric=symmetric, order="natural")
    assert output_loss(W, H, *fitted, 32) < output_loss(W, H, *natural, 32)


def test_stale_group_scales_would_be_seen():
    """With grids from weights that lack the block's own updates, codes differ."""
    W, H = problem(16, 96, seed=5)
    fresh = ours(W, H, bits=3, group_size=32, symmetric=False)
    stale = ours(W, H, bits=3, group_size=32, symmetric=False, static_groups=True)
    assert (fresh[1] != stale[1])[:, 1:].any()
    # The first group has no errors to carry yet.
    np.testing.assert_array_equal(fresh[1][:, 0], stale[1][:, 0])


def test_a_diagonal_hessian_is_rounding_to_nearest():
    W, _ = problem(4, 48, seed=1)
    codes, scales, zeros = ours(W, np.eye(48), bits=4, group_size=16, symmetric=False)
    groups = group_columns(torch.from_numpy(W), 16)
    grid = min_max_grid(groups, AffineScheme(bits=4, symmetric=False))
    np.testing.assert_array_equal(codes, encode(groups, grid).reshape(4, -1).numpy())
    np.testing.assert_array_equal(scales, grid.scale.numpy())
    np.testing.assert_array_equal(zeros, grid.zero.numpy())


def test_padding_codes_mean_zero():
    W, H = problem(4, 20, seed=2)
    for symmetric in (False, True):
        codes, _, zeros = ours(W, H, bits=4, group_size=16, symmetric=symmetric)
        assert codes.shape == (4, 32)
        np.testing.assert_array_equal(codes[:, 20:], np.repeat(zeros[:, 1:], 12, axis=1))


def test_dead_columns_are_rounded_and_counted():
    W, H = problem(4, 32, seed=3, dead=(0, 9, 31))
    factor = factorize(torch.from_numpy(H), group_size=16, damping=0.01, order="group_aware")
    assert factor.dead == 3
    codes, grid = quantize(W, factor, bits=8, group_size=16, symmetric=False)
    dense = decode(codes.view(4, 2, 16), grid).reshape(4, 32)
    assert np.abs(dense.numpy() - W)[:, [0, 9, 31]].max() < 0.02


def test_an_input_that_is_zero_everywhere_is_rounding():
    W, _ = problem(4, 32, seed=4)
    codes, scales, _ = ours(W, np.zeros((32, 32)), bits=4, group_size=16, symmetric=False)
    grid = min_max_grid(
        group_columns(torch.from_numpy(W), 16), AffineScheme(bits=4, symmetric=False)
    )
    np.testing.assert_array_equal(scales, grid.scale.numpy())
    assert np.isfinite(codes).all()


def test_damping_rises_where_the_factorization_fails():
    W, H = problem(4, 32, seed=5)
    # One clearly negative eigenvalue, a fiftieth of the mean diagonal.
    values, vectors = np.linalg.eigh(H)
    values[0] = -0.02 * H.diagonal().mean()
    broken = (vectors * values) @ vectors.T
    factor = factorize(torch.from_numpy(broken), group_size=16, damping=0.01, order="natural")
    assert factor.damping == pytest.approx(0.1)
    expected = textbook.textbook_gptq(
        W, broken, bits=3, group_size=16, symmetric=False, damping=0.1
    )
    found = quantize(W, factor, bits=3, group_size=16, symmetric=False)
    np.testing.assert_array_equal(found[0].numpy(), expected[0])


def test_a_hopeless_hessian_has_no_factor():
    hopeless = torch.eye(8, dtype=torch.float64)
    hopeless[0, 1] = hopeless[1, 0] = 50.0
    assert factorize(hopeless, group_size=4, damping=0.01, order="natural") is None


def test_undamped_singular_hessian_is_damped_a_little():
    H = np.ones((8, 8))
    factor = factorize(torch.from_numpy(H), group_size=4, damping=0.0, order="natural")
    assert 0 < factor.damping <= 0.01


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value):
    H = torch.eye(8, dtype=torch.float64)
    H[2, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        factorize(H, group_size=4, damping=0.01, order="natural")


def test_order_keeps_groups_in_one_piece():
    diagonal = torch.tensor([1.0, 2.0, 9.0, 1.0, 5.0, 6.0, 7.0])
    order = order_columns(diagonal, 3, "group_aware")
    assert order.groups == (0, 2, 1)
    assert order.columns.tolist() == [2, 1, 0, 6, 5, 4, 3]
    assert order.borders == (0, 3, 4, 7)


def test_the_squared_error_grid_is_no_worse_on_weights():
    weights = torch.randn(16, 4, 32, dtype=torch.float64, generator=torch.manual_seed(0))
    for bits in (2, 3, 4):
        wide, narrow = (
            (decode(encode(weights, grid), grid) - weights).square().sum()
            for grid in (
                min_max_grid(weights, AffineScheme(bits=bits, symmetric=False)),
                mse_grid(weights, AffineScheme(bits=bits, symmetric=False)),
            )
        )
        assert narrow < wide


@pytest.mark.parametrize("columns", [511, 512, 513, 1300])
def test_wide_hessians_are_factorized_in_pieces(columns):
    generator = torch.Generator().manual_seed(columns)
    X = torch.randn(2 * columns, columns, generator=generator, dtype=torch.float64)
    H = X.T @ X / X.shape[0]
    factor = factorize(H, group_size=32, damping=0.01, order="group_aware")
    U, order = factor.upper, factor.order.columns
    unit = torch.eye(columns, dtype=torch.float64)
    damped = H[order][:, order] + 0.01 * H.diagonal().mean() * unit
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.T @ U @ damped, unit, rtol=0, atol=1e-11)
    assert torch.equal(order.sort().values, torch.arange(columns))
