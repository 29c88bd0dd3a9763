"""Closed-form repairs against least squares on the inputs themselves, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.calibration.walk.moments import SecondMoment
from pocketvlm.compress.pruning.width.compensation import (
    InputStatistics,
    compensate,
    mean_shift,
    output_energy,
    output_loss,
    refit_survivors,
    removed_mean,
)
from pocketvlm.errors import CalibrationError

METHODS = ("none", "bias", "regression")


def correlated(seed: int, tokens: int = 300, columns: int = 12):
    """Inputs that depend on each other and have means, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    sources = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    means = 2 * torch.randn(columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, columns, generator=generator, dtype=torch.float64)
    return sources @ mixing + means, weight


def exact_statistics(inputs: torch.Tensor, *, centred: bool = True) -> InputStatistics:
    mean = inputs.mean(0) if centred else torch.zeros(inputs.shape[1], dtype=torch.float64)
    moved = inputs - mean
    return InputStatistics(
        mean=mean,
        slices=(slice(0, inputs.shape[1]),),
        covariance=(moved.T @ moved / len(inputs),),
        is_centred=centred,
    )


def squared_error(inputs, weight, fitted, shift, kept) -> float:
    """Token by token, as the definition says."""
    total = 0.0
    for row in inputs:
        change = weight @ row - fitted @ row[kept]
        if shift is not None:
            change = change - shift
        total += float(change @ change)
    return total / len(inputs)


@pytest.mark.parametrize("centred", [True, False])
def test_regression_is_least_squares_with_a_column_of_ones(centred: bool):
    inputs, weight = correlated(0)
    kept = torch.tensor([0, 2, 3, 7, 11])
    statistics = exact_statistics(inputs, centred=centred)
    found = compensate(weight, statistics, kept, "regression", 0.0)
    survivors = inputs[:, kept].numpy()
    if centred:
        survivors = np.column_stack([survivors, np.ones(len(inputs))])
    solution = np.linalg.lstsq(survivors, (inputs @ weight.T).numpy(), rcond=None)[0].T
    np.testing.assert_allclose(found.weight, solution[:, :5], rtol=1e-8, atol=1e-9)
    if centred:
        np.testing.assert_allclose(found.shift, solution[:, 5], rtol=1e-8, atol=1e-9)
    else:
        assert found.shift is None
    assert found.damping == 0.0


@given(seed=st.integers(0, 2**31), count=st.integers(1, 11), damping=st.sampled_from([0, 0.01, 1]))
@settings(max_examples=30, deadline=None)
def test_each_repair_is_at_least_as_good_as_the_one_before(seed: int, count: int, damping: float):
    inputs, weight = correlated(seed, tokens=60)
    kept = torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    statistics = exact_statistics(inputs)
    losses = []
    for how in METHODS:
        found = compensate(weight, statistics, kept, how, damping)
        loss = output_loss(weight, found.weight, found.shift, statistics, kept)
        direct = squared_error(inputs, weight, found.weight, found.shift, kept)
        assert loss == pytest.approx(direct, rel=1e-8, abs=1e-9)
        losses.append(loss)
    none, bias, regression = losses
    assert bias <= none + 1e-9
    assert regression <= bias + 1e-9
    energy = squared_error(inputs, weight, weight[:, :0], None, kept[:0])
    assert output_energy(weight, statistics) == pytest.approx(energy, rel=1e-9)


def test_the_bias_is_the_mean_of_what_is_gone():
    inputs, weight = correlated(1)
    kept = torch.tensor([1, 4, 5])
    gone = [index for index in range(12) if index not in kept]
    expected = torch.stack([weight[:, gone] @ row[gone] for row in inputs]).mean(0)
    statistics = exact_statistics(inputs)
    torch.testing.assert_close(removed_mean(weight, statistics.mean, kept), expected)
    found = compensate(weight, statistics, kept, "bias", 0.01)
    torch.testing.assert_close(found.shift, expected)
    assert torch.equal(found.weight, weight[:, kept])
    shift = mean_shift(weight, weight[:, kept], statistics.mean, kept)
    torch.testing.assert_close(shift, expected)


def test_damping_pulls_survivors_to_where_they_are():
    inputs, weight = correlated(2)
    kept = torch.arange(6)
    moved = [
        float(
            (refit_survivors(weight, exact_statistics(inputs), kept, d)[0] - weight[:, :6]).norm()
        )
        for d in (0.0, 0.01, 0.1, 1.0)
    ]
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] > 0


def test_inputs_that_hang_together_exactly_are_damped_as_far_as_needed():
    source = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    inputs = torch.stack([source, source, 2 * source, source], dim=1)
    weight = torch.ones(2, 4, dtype=torch.float64)
    kept = torch.tensor([0, 1])
    fitted, used = refit_survivors(weight, exact_statistics(inputs), kept, 0.0)
    assert 0 < used <= 1e-3
    # What is gone was three times the source; the two that stay share it.
    torch.testing.assert_close(fitted, torch.full_like(fitted, 2.5), rtol=1e-3, atol=0)


def test_inputs_that_never_vary_teach_nothing():
    inputs, weight = correlated(4)
    inputs[:] = inputs[0]
    found = compensate(weight, exact_statistics(inputs), torch.tensor([0, 5]), "regression", 0.01)
    torch.testing.assert_close(found.weight, weight[:, [0, 5]])
    loss = squared_error(inputs, weight, found.weight, found.shift, torch.tensor([0, 5]))
    assert loss == pytest.approx(0, abs=1e-18)


def test_diagonal_blocks_are_solved_one_by_one():
    inputs, weight = correlated(5)
    whole = exact_statistics(inputs).covariance[0]
    halves = (slice(0, 6), slice(6, 12))
    blocks = tuple(whole[part, part] for part in halves)
    cut = InputStatistics(mean=inputs.mean(0), slices=halves, covariance=blocks, is_centred=True)
    separate = torch.zeros(12, 12, dtype=torch.float64)
    for part, block in zip(halves, blocks, strict=True):
        separate[part, part] = block
    joint = InputStatistics(
        mean=inputs.mean(0), slices=(slice(0, 12),), covariance=(separate,), is_centred=True
    )
    kept = torch.tensor([0, 1, 4, 6, 8])
    found, _ = refit_survivors(weight, cut, kept, 0.0)
    expected, _ = refit_survivors(weight, joint, kept, 0.0)
    torch.testing.assert_close(found, expected)


def test_statistics_come_from_weighted_tokens():
    inputs, _ = correlated(6)
    weights = torch.rand(len(inputs))
    moment = SecondMoment(12)
    for part in (slice(0, 100), slice(100, 300)):
        moment.add(inputs[part].float(), weights[part])
    shares = (weights / weights.sum()).double()
    mean = (inputs * shares[:, None]).sum(0)
    moved = inputs - mean
    centred = InputStatistics.from_moment(moment, centred=True)
    torch.testing.assert_close(centred.mean, mean, rtol=1e-5, atol=1e-5)
    expected = (moved * shares[:, None]).T @ moved
    torch.testing.assert_close(centred.covariance[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(centred.variance, expected.diagonal(), rtol=1e-4, atol=1e-4)
    raw = InputStatistics.from_moment(moment, centred=False)
    expected = (inputs * shares[:, None]).T @ inputs
    torch.testing.assert_close(raw.covariance[0], expected, rtol=1e-4, atol=1e-4)
    assert not raw.mean.any()


def test_nothing_seen_is_an_error():
    with pytest.raises(CalibrationError, match="no calibration token"):
        InputStatistics.from_moment(SecondMoment(3), centred=True)
