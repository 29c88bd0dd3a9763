"""Intervals of ratios: what they cover, what they cancel, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from pocketvlm.device_bench.gate.bootstrap import (
    LEAST_PROCESSES,
    interval_of_pairs,
    interval_of_samples,
)


def processes(random, count, *, scale=1.0, drift=0.0):
    """Times of processes with a heavy tail: most are quiet, some shared their core."""
    times = 10.0 * scale * random.lognormal(0.0, 0.02, count)
    times[random.random(count) < 0.1] *= 1.6
    return times * np.exp(drift * np.sin(np.arange(count) / 3))


def test_equal_samples_have_an_interval_of_one():
    values = [9.0, 10.0, 11.0, 10.0, 30.0]
    paired = interval_of_pairs(values, values)
    assert (paired.low, paired.ratio, paired.high) == (1.0, 1.0, 1.0)
    separate = interval_of_samples(values, values)
    assert separate.low < 1 < separate.high


def test_the_ratio_is_of_b_to_a_and_inverts_with_them():
    slow = interval_of_pairs([10.0] * 6, [11.0] * 6)
    fast = interval_of_pairs([11.0] * 6, [10.0] * 6)
    assert slow.ratio == pytest.approx(1.1)
    assert (fast.low, fast.high) == (pytest.approx(1 / slow.high), pytest.approx(1 / slow.low))


def test_pairs_cancel_a_drift_that_separate_samples_do_not():
    random = np.random.default_rng(0)
    first = processes(random, 20, drift=0.4)
    second = first * 1.1 * random.lognormal(0.0, 0.01, 20)
    paired, separate = interval_of_pairs(first, second), interval_of_samples(first, second)
    assert 1.08 < paired.low < paired.high < 1.12
    assert separate.high - separate.low > 5 * (paired.high - paired.low)


def test_intervals_cover_the_truth_as_often_as_they_say():
    random = np.random.default_rng(1)
    covered = sum(
        found.low <= 1.1 <= found.high
        for found in (
            interval_of_pairs(processes(random, 12), processes(random, 12, scale=1.1))
            for _ in range(100)
        )
    )
    assert covered >= 96


def test_one_disturbed_process_moves_nothing():
    quiet = interval_of_pairs([10.0] * 20, [10.2] * 20)
    disturbed = interval_of_pairs([10.0] * 20, [10.2] * 19 + [40.0])
    assert disturbed.ratio == quiet.ratio
    assert disturbed.high == pytest.approx(quiet.high)


def test_the_same_samples_give_the_same_interval():
    random = np.random.default_rng(2)
    first, second = processes(random, 9), processes(random, 9)
    assert interval_of_pairs(first, second) == interval_of_pairs(first, second)
    assert interval_of_samples(first, second) == interval_of_samples(first, second)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([1.0] * 4, [1.0] * 4, f"4 processes; an interval needs {LEAST_PROCESSES}"),
        ([1.0] * 5, [1.0] * 6, "5 and 6 processes do not make pairs"),
        ([1.0] * 5, [1.0] * 4 + [0.0], "above zero"),
        ([1.0] * 5, [1.0] * 4 + [float("nan")], "above zero"),
    ],
)
def test_too_few_or_impossible_samples_are_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        interval_of_pairs(first, second)
