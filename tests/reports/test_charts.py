from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketvlm.reports.charts import (
    axis_ticks,
    draw_bars,
    draw_interval,
    draw_strip,
)


@given(st.floats(min_value=1e-6, max_value=1e12))
def test_an_axis_starts_at_zero_and_holds_everything(most):
    ticks = axis_ticks(most)
    assert ticks[0] == 0.0
    assert ticks[-1] >= most * (1 - 1e-6)
    assert ticks[-1] <= most * 2.1
    assert 2 <= len(ticks) <= 8
    steps = {round((b - a) / ticks[1], 6) for a, b in itertools.pairwise(ticks)}
    assert steps == {1.0}


@pytest.mark.parametrize("most", [0.0, -1.0, float("nan"), float("inf")])
def test_an_axis_of_nothing_is_still_an_axis(most):
    assert axis_ticks(most) == (0.0, 1.0)


def test_lengths_are_in_proportion_and_share_one_scale():
    long, short = draw_bars([("a", {"x": 30.0, "y": 70.0}), ("b", {"x": 25.0})])
    assert [(part.start, part.width) for part in long.segments] == [(0, 30), (30, 70)]
    assert [(part.start, part.width) for part in short.segments] == [(0, 25)]
    assert (long.total, short.total) == (100.0, 25.0)


def test_dots_of_both_bundles_share_one_axis():
    strip = draw_strip([("candidate", [10.0, 20.0], 15.0, 19.0), ("baseline", [40.0], 40.0, 40.0)])
    candidate, baseline = strip.lanes
    assert [x for x, _, _ in candidate.points] == [25.0, 50.0]
    assert [x for x, _, _ in baseline.points] == [100.0]
    assert candidate.median == 37.5
    assert [tick.label for tick in strip.ticks] == ["0", "10", "20", "30", "40"]


def test_an_interval_with_one_end_is_left_out():
    whole = draw_interval("bundle", "candidate", 0.5, 0.4, 0.6)
    assert (whole.point, whole.low, whole.high) == (50.0, 40.0, 60.0)
    half = draw_interval("bundle", "candidate", 0.5, 0.4, None)
    assert (half.low, half.high) == (None, None)
