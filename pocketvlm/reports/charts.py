"""Geometry of the report's charts: numbers in, positions out; the template draws them.

Horizontal positions are percentages and vertical ones pixels, so that a chart stretches with the
page while its dots stay round and its text readable. Axes of amounts start at zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "Bar",
    "Dots",
    "IntervalRow",
    "Segment",
    "Strip",
    "Tick",
    "axis_ticks",
    "draw_bars",
    "draw_interval",
    "draw_strip",
]

_TICKS = 5
_DOT_ROWS = 3


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A mark of an axis."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Dots:
    """The raw samples of one role on one line.

    Attributes:
        role: `arm` or `reference`; the template colours by it.
        points: (horizontal per cent, vertical pixels from the middle, value).
        median: Horizontal per cent.
        p90: Horizontal per cent.
    """

    role: str
    points: tuple[tuple[float, float, float], ...]
    median: float
    p90: float


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Lines of dots over one axis."""

    lanes: tuple[Dots, ...]
    ticks: tuple[Tick, ...]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a stacked bar."""

    name: str
    start: float
    width: float
    value: float


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A stacked bar."""

    label: str
    segments: tuple[Segment, ...]
    total: float


@dataclass(frozen=True, kw_only=True)
class IntervalRow:
    """A share with its interval, on an axis from 0 to 100 per cent."""

    label: str
    role: str
    point: float
    low: float | None
    high: float | None


def axis_ticks(most: float, count: int = _TICKS) -> tuple[float, ...]:
    """Round values from 0 to at least `most`, about `count` of them."""
    if not (math.isfinite(most) and most > 0):
        return (0.0, 1.0)
    rough = most / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    # The smallest round step that does not draw too many lines.
    step = next(
        factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999
    )
    return tuple(round(index * step, 12) for index in range(math.ceil(most / step - 1e-9) + 1))


def draw_strip(lanes: Sequence[tuple[str, Sequence[float], float, float]]) -> Strip:
    """Dots over a common axis.

    Args:
        lanes: (role, samples, median, 90 % quantile) from top to bottom.
    """
    most = max(value for _, samples, _, _ in lanes for value in samples)
    ticks = axis_ticks(most)
    scale = 100 / ticks[-1]

    def place(value: float) -> float:
        return round(value * scale, 3)

    return Strip(
        lanes=tuple(
            Dots(
                role=role,
                # Consecutive samples have different heights, so that equal values stay visible.
                points=tuple(
                    (place(value), (index % _DOT_ROWS - 1) * 4.0, value)
                    for index, value in enumerate(samples)
                ),
                median=place(median),
                p90=place(p90),
            )
            for role, samples, median, p90 in lanes
        ),
        ticks=tuple(Tick(at=place(value), label=f"{value:g}") for value in ticks),
    )


def draw_bars(
    rows: Sequence[tuple[str, Mapping[str, float]]], *, scale_to: float | None = None
) -> tuple[Bar, ...]:
    """Stacked bars over a common axis; the longest fills it.

    Args:
        rows: (label, amounts by name) from top to bottom.
        scale_to: The amount that fills the axis; `None` for the largest sum.
    """
    totals = [sum(parts.values()) for _, parts in rows]
    full = scale_to or max(totals, default=0.0) or 1.0
    bars = []
    for (label, parts), total in zip(rows, totals, strict=True):
        segments, start = [], 0.0
        for name, value in parts.items():
            width = value / full * 100
            segments.append(
                Segment(name=name, start=round(start, 3), width=round(width, 3), value=value)
            )
            start += width
        bars.append(Bar(label=label, segments=tuple(segments), total=total))
    return tuple(bars)


def draw_interval(
    label: str, role: str, point: float, low: float | None, high: float | None
) -> IntervalRow:
    """A share of 1 and its interval in per cent; an interval with only one end is left out."""
    if low is None or high is None:
        low_at = high_at = None
    else:
        low_at, high_at = round(low * 100, 3), round(high * 100, 3)
    return IntervalRow(
        label=label, role=role, point=round(point * 100, 3), low=low_at, high=high_at
    )
