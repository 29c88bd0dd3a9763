"""Confidence intervals of a score and of the difference of two scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb, sqrt
from typing import Any

__all__ = ["Z_95", "PairedDifference", "compare_paired", "wilson_interval"]

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson_interval(correct: float, n: int, *, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927); for credits in [0, 1] it is conservative.

    Args:
        correct: Right answers, or the sum of credits.
        n: Questions, at least 1.
        z: Quantile of the normal distribution.

    Returns:
        Lower and upper end, within [0, 1].
    """
    if n < 1:
        raise ValueError("an interval needs at least one question")
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Two subjects on the same questions; 0.01 is one percentage point.

    Attributes:
        n: Questions.
        difference: Accuracy of the candidate minus that of the baseline.
        interval_low: Lower end of the 95 % interval of the difference.
        interval_high: Upper end.
        only_baseline: Questions on which the baseline earned more.
        only_candidate: Questions on which the candidate earned more.
        p_value: P-value of the exact two-sided McNemar test that both are equally good.
    """

    n: int
    difference: float
    interval_low: float
    interval_high: float
    only_baseline: int
    only_candidate: int
    p_value: float

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return asdict(self)


def compare_paired(baseline: Sequence[float], candidate: Sequence[float]) -> PairedDifference:
    """Compares credits question by question.

    The interval is that of Agresti and Min (Statistics in Medicine 24, 2005): Wald's, with half a
    question added to each of the four cells. Unlike a bootstrap it has a width even if the two
    never differ.

    Args:
        baseline: Credits of the baseline.
        candidate: Credits of the candidate for the same questions, in the same order.

    Raises:
        ValueError: There are no questions, or the numbers of credits differ.
    """
    n = len(baseline)
    if n == 0 or n != len(candidate):
        raise ValueError(f"{n} and {len(candidate)} credits cannot be compared in pairs")
    gains = [after - before for before, after in zip(baseline, candidate, strict=True)]
    # Half a question with a gain of +1, half with -1, and one with 0: two more questions.
    padded = n + 2
    mean = sum(gains) / padded
    square = (sum(gain * gain for gain in gains) + 1) / padded
    half = Z_95 * sqrt((square - mean * mean) / padded)
    losses, wins = sum(gain < 0 for gain in gains), sum(gain > 0 for gain in gains)
    return PairedDifference(
        n=n,
        difference=sum(gains) / n,
        interval_low=max(-1.0, mean - half),
        interval_high=min(1.0, mean + half),
        only_baseline=losses,
        only_candidate=wins,
        p_value=_sign_test(losses, wins),
    )


def _sign_test(losses: int, wins: int) -> float:
    discordant = losses + wins
    tail = sum(comb(discordant, k) for k in range(min(losses, wins) + 1))
    return min(1.0, 2 * tail / 2**discordant)
