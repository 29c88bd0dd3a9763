"""Intervals: textbook values, coverage by simulation, and the exact sign test by enumeration."""

from __future__ import annotations

from itertools import product
from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketvlm.evaluation.intervals import Z_95, compare_paired, wilson_interval


def test_wilson_solves_its_equation() -> None:
    # The ends are where |p - share| equals z standard errors of p itself.
    for correct, n in ((7, 10), (1, 30), (455, 500)):
        for end in wilson_interval(correct, n):
            assert abs(end - correct / n) == pytest.approx(Z_95 * sqrt(end * (1 - end) / n))


def test_wilson_stays_inside_and_has_width_at_the_ends() -> None:
    assert wilson_interval(0, 20)[0] == 0.0
    assert wilson_interval(0, 20)[1] == pytest.approx(0.161, abs=5e-4)  # a published value
    assert wilson_interval(20, 20)[1] == 1.0
    with pytest.raises(ValueError, match="at least one question"):
        wilson_interval(0, 0)


@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_share(n: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, n))
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= correct / n + 1e-12
    assert correct / n - 1e-12 <= high <= 1


def test_wilson_covers_95_percent() -> None:
    rng = np.random.default_rng(0)
    draws = rng.binomial(200, 0.92, size=4000)
    inside = [low <= 0.92 <= high for low, high in (wilson_interval(int(d), 200) for d in draws)]
    assert 0.93 < np.mean(inside) < 0.975


def test_paired_interval_covers_95_percent_and_beats_the_unpaired_one() -> None:
    rng = np.random.default_rng(1)
    n, lose, win = 300, 0.05, 0.03
    inside, widths = [], []
    for _ in range(1500):
        base = (rng.random(n) < 0.9).astype(float)
        flip = rng.random(n)
        after = np.where(base == 1, flip >= lose / 0.9, flip < win / 0.1).astype(float)
        found = compare_paired(list(base), list(after))
        inside.append(found.interval_low <= win - lose <= found.interval_high)
        widths.append(found.interval_high - found.interval_low)
    assert 0.93 < np.mean(inside) < 0.98
    unpaired = 2 * Z_95 * sqrt(0.9 * 0.1 / n + 0.88 * 0.12 / n)
    assert np.mean(widths) < 0.8 * unpaired


def test_no_difference_still_has_a_width() -> None:
    found = compare_paired([1.0] * 50, [1.0] * 50)
    assert found.difference == 0
    assert found.interval_low < 0 < found.interval_high
    assert found.p_value == 1.0


@pytest.mark.parametrize(("losses", "wins"), [(0, 1), (5, 1), (3, 3), (0, 8)])
def test_the_p_value_counts_every_outcome(losses: int, wins: int) -> None:
    discordant = losses + wins
    observed = abs(wins - losses)
    as_extreme = [
        abs(2 * sum(o) - discordant) >= observed for o in product((0, 1), repeat=discordant)
    ]
    baseline = [1.0] * losses + [0.0] * wins + [1.0] * 4
    candidate = [0.0] * losses + [1.0] * wins + [1.0] * 4
    found = compare_paired(baseline, candidate)
    assert found.p_value == pytest.approx(np.mean(as_extreme))
    assert (found.only_baseline, found.only_candidate) == (losses, wins)


def test_unequal_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared in pairs"):
        compare_paired([1.0], [])
