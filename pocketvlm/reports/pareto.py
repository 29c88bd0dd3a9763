"""The Pareto front: bundles that no other one beats in quality and cost at once."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["pareto_front"]


def pareto_front(points: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """Indices of the points on the front, from the cheapest to the best.

    A point is on the front if every point that costs no more is worse, or is the same point again.

    Args:
        points: (cost, quality) pairs; less cost and more quality are better.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda at: (points[at][0], -points[at][1])):
        if (
            not front
            or points[index][1] > points[front[-1]][1]
            or points[index] == points[front[-1]]
        ):
            front.append(index)
    return tuple(front)
