"""Shares out a budget in whole numbers: what every group keeps, from how much it matters.

The rule is ECoFLaP's (arXiv 2310.02998, section 3.2): every group keeps a floor, and what is left
is shared in proportion to the scores, no group getting more than it has. Its code adds rounded-up
shares round by round in float32 and so overshoots the budget, and where it does, it adds the
overshoot once more. The rounds converge to a level that is found here directly, in rational
numbers, and rounded once: the sum is the budget, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

__all__ = ["allocate_budget", "spread_evenly"]


def allocate_budget(
    scores: Sequence[float],
    sizes: Sequence[int],
    kept_total: int,
    *,
    max_sparsity: Fraction | float,
) -> list[int]:
    """How much every group keeps: its floor, and of the rest a share in proportion to its score.

    With floors l_g = ceil(N_g (1 - max_sparsity)) group g keeps min(N_g, l_g + level * s_g), where
    the level is the one at which the sum is the budget. So of two groups the one with the higher
    score a parameter keeps the larger share. What groups with a score cannot hold goes to those
    without one, by size. Rounded by largest remainders; of equal ones the higher score a
    parameter, then the earlier group, gets the unit, so that the order of groups matters only
    between groups that are alike.

    Args:
        scores: Importance of every group as a whole, finite and not negative.
        sizes: Units of every group, at least 1.
        kept_total: Units that all groups keep together.
        max_sparsity: Share that a group may lose at most, in [0, 1]; an exact fraction where it
            stands for a decimal number.

    Returns:
        Units that every group keeps, each within its bounds; their sum is `kept_total`.

    Raises:
        ValueError: A score or a size is out of range, or the bounds leave no room for the budget.
    """
    if any(not math.isfinite(score) or score < 0 for score in scores):
        raise ValueError("scores must be finite and at least 0")
    if any(size < 1 for size in sizes):
        raise ValueError("sizes must be at least 1")
    if not 0 <= max_sparsity <= 1:
        raise ValueError(f"max_sparsity must lie between 0 and 1, not {float(max_sparsity):g}")
    kept_share = 1 - Fraction(max_sparsity)
    floors = [math.ceil(size * kept_share) for size in sizes]
    if not sum(floors) <= kept_total <= sum(sizes):
        raise ValueError(
            f"{kept_total} of {sum(sizes)} cannot be kept where each group loses at most "
            f"{float(max_sparsity):g}: allowed are {sum(floors)} to {sum(sizes)}"
        )
    rooms = [size - floor for size, floor in zip(sizes, floors, strict=True)]
    exact = [Fraction(score) for score in scores]
    shares = _fill(exact, rooms, kept_total - sum(floors))
    density = [score / size for score, size in zip(exact, sizes, strict=True)]
    return [
        floor + share for floor, share in zip(floors, _round_to_sum(shares, density), strict=True)
    ]


def spread_evenly(kept: int, sizes: Sequence[int]) -> list[int]:
    """How much every layer of a group keeps, so that all lose the same share, and none all of it.

    Each keeps one unit, and of the rest a share in proportion to its other units.

    Args:
        kept: Units that the layers keep together.
        sizes: Units of every layer, at least 1.

    Raises:
        ValueError: There are more layers than units to keep, or fewer units than to keep.
    """
    count = len(sizes)
    if not count <= kept <= sum(sizes):
        raise ValueError(f"{kept} of {sum(sizes)} cannot be kept by {count} layers, one at least")
    rest = Fraction(kept - count, max(1, sum(sizes) - count))
    shares = [rest * (size - 1) for size in sizes]
    return [1 + share for share in _round_to_sum(shares, [Fraction(size) for size in sizes])]


def _fill(scores: Sequence[Fraction], rooms: Sequence[int], total: int) -> list[Fraction]:
    """min(room, level * score) for every group, at the level where they add up to the total."""
    left, weight = Fraction(total), sum(scores, Fraction(0))
    level = Fraction(0)
    # Groups fill up in this order as the level rises.
    scored = [index for index, score in enumerate(scores) if score]
    for index in sorted(scored, key=lambda index: rooms[index] / scores[index]):
        level = left / weight
        if level * scores[index] <= rooms[index]:
            break
        left -= rooms[index]
        weight -= scores[index]
    shares = [min(Fraction(room), level * score) for score, room in zip(scores, rooms, strict=True)]
    unplaced = total - sum(shares, Fraction(0))
    if unplaced:
        empty = sum(room for score, room in zip(scores, rooms, strict=True) if not score)
        shares = [
            share if score else unplaced * Fraction(room, empty)
            for share, score, room in zip(shares, scores, rooms, strict=True)
        ]
    return shares


def _round_to_sum(shares: Sequence[Fraction], priority: Sequence[Fraction]) -> list[int]:
    """Whole numbers next to the shares, with the same sum, which is whole."""
    found = [math.floor(share) for share in shares]
    order = sorted(
        range(len(shares)),
        key=lambda index: (found[index] - shares[index], -priority[index], index),
    )
    for index in order[: int(sum(shares, Fraction(0))) - sum(found)]:
        found[index] += 1
    return found
