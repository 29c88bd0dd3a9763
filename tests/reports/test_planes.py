from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.reports.pareto import pareto_front
from pocketvlm.reports.planes import Point, draw_lines, draw_plane

POINTS = st.lists(
    st.tuples(st.integers(1, 9).map(float), st.integers(1, 9).map(float)), min_size=1, max_size=12
)


@given(POINTS)
def test_the_front_is_what_no_other_point_beats(points):
    def is_beaten(one):
        return any(other != one and other[0] <= one[0] and other[1] >= one[1] for other in points)

    front = pareto_front(points)
    assert sorted(front) == [at for at, one in enumerate(points) if not is_beaten(one)]
    costs = [points[at][0] for at in front]
    assert costs == sorted(costs)


def point(cost, quality, **more):
    return Point(label="1", words="a", cost=cost, quality=quality, **more)


def test_a_plane_is_logarithmic_and_its_front_a_staircase():
    plane = draw_plane([point(1.0, 0.8), point(10.0, 0.9), point(100.0, 0.85)], height=100.0)
    left, middle, right = (dot.at for dot in plane.dots)
    assert middle - left == pytest.approx(right - middle, abs=0.01)
    assert [dot.is_on_front for dot in plane.dots] == [True, True, False]
    assert plane.dots[1].y < plane.dots[2].y < plane.dots[0].y
    (x1, y1, x2, y2), (x3, y3, x4, y4) = plane.front
    assert (x1, y1) == (left, plane.dots[0].y)
    assert (x2, y2) == (x3, y3) == (middle, plane.dots[0].y)
    assert (x4, y4) == (middle, plane.dots[1].y)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(1e-6, 1e12), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=15
    )
)
def test_everything_lies_inside_its_axes(rows):
    points = [point(cost, share, low=min(share, low)) for cost, share, low in rows]
    plane = draw_plane(points)
    for dot in plane.dots:
        assert 0 <= dot.at <= 100
        assert -0.01 <= dot.y <= plane.height + 0.01
        assert dot.low_y is not None
        assert dot.low_y <= plane.height + 0.01
    for ticks in (plane.x_ticks, plane.y_ticks):
        assert 2 <= len(ticks) <= 22
        assert len({tick.label for tick in ticks}) == len(ticks)
    assert all(0 <= tick.at <= 100 for tick in plane.x_ticks)


def test_labels_of_neighbours_do_not_cover_each_other():
    plane = draw_plane([point(1.0, 0.9), point(1.001, 0.9), point(5.0, 0.5)])
    first, second, _ = ((dot.dx, dot.dy) for dot in plane.dots)
    assert first != second


def test_lines_share_their_axes_and_start_at_zero():
    lines = draw_lines({"a": [(1.0, 50.0), (2.0, 100.0)], "b": [(4.0, 25.0)]}, height=100.0)
    first, second = lines.series
    assert first.points == ((25.0, 50.0, 50.0), (50.0, 0.0, 100.0))
    assert first.segments == ((25.0, 50.0, 50.0, 0.0),)
    assert (second.points[0][0], second.segments) == (100.0, ())
    assert (lines.x_ticks[0].at, lines.y_ticks[0].at) == (0.0, 100.0)
