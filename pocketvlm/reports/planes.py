"""Geometry of charts with two axes: lines over time, and quality against cost.

As in `charts`, horizontal positions are per cent and vertical ones pixels from the top.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pocketvlm.reports.charts import Tick, axis_ticks
from pocketvlm.reports.pareto import pareto_front

__all__ = ["Dot", "Lines", "Plane", "Point", "Polyline", "draw_lines", "draw_plane"]

_LINES_HEIGHT = 150.0
_PLANE_HEIGHT = 260.0
_PHONE_WIDTH = (
    290.0  # pixels of a plane on the narrowest screen: labels that fit there fit anywhere
)
_LABEL = (7.0, 12.0)  # width of a digit and height of a line, in pixels
_AROUND = ((9, 4), (9, -7), (9, 15), (-9, 4), (-9, -7), (-9, 15), (0, -10), (0, 19))
_ROUND_STEPS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
_MOST_TICKS = 6
_NARROW = 4.0  # an axis over less than this ratio has equal steps


@dataclass(frozen=True, kw_only=True)
class Polyline:
    """One series: its points, and the segments between neighbours.

    Attributes:
        name: The series.
        points: (horizontal per cent, vertical pixels, value).
        segments: (x1, y1, x2, y2).
    """

    name: str
    points: tuple[tuple[float, float, float], ...]
    segments: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Series over a common horizontal axis."""

    series: tuple[Polyline, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    height: float


@dataclass(frozen=True, kw_only=True)
class Point:
    """A bundle in a plane of cost and quality.

    Attributes:
        label: What is written beside its dot.
        words: What its tooltip says.
        cost: Above zero; less is better.
        quality: A share of 1, with its interval if there is one.
        group: Index of its shape and colour.
        is_hollow: Whether its dot is only an outline.
    """

    label: str
    words: str
    cost: float
    quality: float
    low: float | None = None
    high: float | None = None
    group: int = 0
    is_hollow: bool = False


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A point that was placed.

    Attributes:
        at: Horizontal per cent.
        y: Vertical pixels.
        low_y: Lower end of its interval, in pixels.
        high_y: Upper end.
        dx: Pixels from the dot to its label.
        dy: Likewise.
        anchor: The end of the label that is nearest to the dot.
    """

    point: Point
    at: float
    y: float
    low_y: float | None
    high_y: float | None
    dx: float
    dy: float
    anchor: str
    is_on_front: bool


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Quality against cost; the cost axis is logarithmic, `front` is a staircase of segments."""

    dots: tuple[Dot, ...]
    front: tuple[tuple[float, float, float, float], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    height: float


def draw_lines(
    series: Mapping[str, Sequence[tuple[float, float]]], *, height: float = _LINES_HEIGHT
) -> Lines:
    """Series of (x, y) points; both axes start at zero.

    Args:
        series: Points from left to right, by name; not all of them empty.
        height: Pixels from zero to the top.
    """
    points = [point for one in series.values() for point in one]
    x_ticks = axis_ticks(max(x for x, _ in points))
    y_ticks = axis_ticks(max(y for _, y in points), 3)

    def place(point: tuple[float, float]) -> tuple[float, float, float]:
        x, y = point
        return round(x / x_ticks[-1] * 100, 3), round(height * (1 - y / y_ticks[-1]), 2), y

    drawn = []
    for name, one in series.items():
        placed = tuple(place(point) for point in one)
        pairs = itertools.pairwise(placed)
        drawn.append(
            Polyline(
                name=name,
                points=placed,
                segments=tuple((x1, y1, x2, y2) for (x1, y1, _), (x2, y2, _) in pairs),
            )
        )
    return Lines(
        series=tuple(drawn),
        x_ticks=tuple(Tick(at=place((x, 0))[0], label=f"{x:g}") for x in x_ticks),
        y_ticks=tuple(Tick(at=place((0, y))[1], label=f"{y:g}") for y in y_ticks),
        height=height,
    )


def draw_plane(points: Sequence[Point], *, height: float = _PLANE_HEIGHT) -> Plane:
    """Points with their Pareto front.

    Args:
        points: At least one.
        height: Pixels of the plane.
    """
    left = math.log(min(point.cost for point in points) / 1.12)
    right = math.log(max(point.cost for point in points) * 1.12)
    ends = [
        end for point in points for end in (point.quality, point.low, point.high) if end is not None
    ]
    y_ticks = _quality_ticks(min(ends) * 100, max(ends) * 100)
    bottom, top = y_ticks[0], y_ticks[-1]

    def place_x(cost: float) -> float:
        return round((math.log(cost) - left) / (right - left) * 100, 3)

    def place_y(share: float) -> float:
        return round(height * (top - share * 100) / (top - bottom), 2)

    front = pareto_front([(point.cost, point.quality) for point in points])
    spots = [(place_x(point.cost), place_y(point.quality)) for point in points]
    labels = _place_labels([point.label for point in points], spots, height)
    corners = [spots[index] for index in front]
    return Plane(
        dots=tuple(
            Dot(
                point=point,
                at=spots[index][0],
                y=spots[index][1],
                low_y=None if point.low is None else place_y(point.low),
                high_y=None if point.high is None else place_y(point.high),
                dx=labels[index][0],
                dy=labels[index][1],
                anchor="middle"
                if not labels[index][0]
                else "start"
                if labels[index][0] > 0
                else "end",
                is_on_front=index in front,
            )
            for index, point in enumerate(points)
        ),
        front=tuple(
            segment
            for (x1, y1), (x2, y2) in itertools.pairwise(corners)
            for segment in ((x1, y1, x2, y1), (x2, y1, x2, y2))
        ),
        x_ticks=tuple(
            Tick(at=place_x(cost), label=f"{cost:g}")
            for cost in _cost_ticks(math.exp(left), math.exp(right))
        ),
        y_ticks=tuple(Tick(at=place_y(share / 100), label=f"{share:g}") for share in y_ticks),
        height=height,
    )


def _quality_ticks(low: float, high: float) -> tuple[float, ...]:
    """Round percentages around the points; the axis does not start at zero."""
    step = next(
        (step for step in (1.0, 2.0, 5.0, 10.0) if (high - low) / step <= _MOST_TICKS - 1), 20.0
    )
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return tuple(index * step for index in range(first, last + 1))


def _cost_ticks(low: float, high: float) -> tuple[float, ...]:
    """Round costs between the ends of a logarithmic axis."""
    if high / low < _NARROW:
        return _linear_ticks(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in (_ROUND_STEPS, (1.0, 2.0, 5.0), (1.0,)):
        found = tuple(
            cost
            for power in powers
            for step in steps
            if low <= (cost := step * 10.0**power) <= high
        )
        if len(found) <= _MOST_TICKS:
            break
    return found


def _linear_ticks(low: float, high: float) -> tuple[float, ...]:
    """Equal round steps between the ends of a short axis."""
    magnitude = 10.0 ** math.floor(math.log10(high - low))
    step = next(
        factor * magnitude
        for factor in (0.1, 0.2, 0.5, 1.0, 2.0)
        if (high - low) / (factor * magnitude) <= _MOST_TICKS
    )
    indices = range(math.ceil(low / step), math.floor(high / step) + 1)
    return tuple(round(index * step, 12) for index in indices)


def _place_labels(
    labels: Sequence[str], spots: Sequence[tuple[float, float]], height: float
) -> list[tuple[float, float]]:
    """For each dot, the first place beside it where its label covers no dot and no other label."""
    dots = [(x / 100 * _PHONE_WIDTH, y) for x, y in spots]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    chosen = []
    for label, (x, y) in zip(labels, dots, strict=True):
        width = _LABEL[0] * len(label)
        boxes = []
        for dx, dy in _AROUND:
            start = x + dx - (width / 2 if dx == 0 else width if dx < 0 else 0)
            boxes.append((start, y + dy - _LABEL[1] + 2, start + width, y + dy + 2))
        costs = [
            sum(_overlap(box, other) for other in taken)
            + 1e3 * (box[0] < 0 or box[2] > _PHONE_WIDTH or box[1] < 0 or box[3] > height)
            for box in boxes
        ]
        best = costs.index(min(costs))
        taken.append(boxes[best])
        chosen.append((float(_AROUND[best][0]), float(_AROUND[best][1])))
    return chosen


def _overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> float:
    """The area that two boxes (left, top, right, bottom) share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0
