"""Rows of tables that compare compressed models by their answers, over several calibration sets."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pocketvlm.evaluation.intervals import compare_paired, wilson_interval
from pocketvlm.evaluation.score import Score

__all__ = ["COLUMNS", "RULE", "Row"]

COLUMNS = "Accuracy [95 %] | Each set | Against float | Against {baseline} | Seconds |"
RULE = "--- | --- | --- | --- | ---: |"

Points = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one size.

    A question's credit is its mean over calibration sets, so that questions are what intervals are
    of; differences are paired, in points, with the ends of their 95 % interval.

    Attributes:
        model: Name of the model.
        keys: What was done, as the first columns of the table show it.
        seconds: Mean time of compression.
        n: Questions.
        accuracy: Mean over questions and sets.
        interval: Wilson's 95 % interval of it.
        accuracies: Of each calibration set.
        against_float: Difference to the float model.
        against_baseline: Difference to the table's own baseline, where there is one.
        credits: Of every question.
    """

    model: str
    keys: tuple[str, ...]
    seconds: float
    n: int
    accuracy: float
    interval: tuple[float, float]
    accuracies: tuple[float, ...]
    against_float: Points
    against_baseline: Points | None
    credits: tuple[float, ...]

    @classmethod
    def of(
        cls,
        model: str,
        keys: Sequence[str],
        scores: Sequence[Score],
        *,
        floats: Score,
        baseline: Row | None,
        seconds: float,
    ) -> Row:
        """Puts the scores of one method on all calibration sets together."""
        per_set = zip(*(score.credits for score in scores), strict=True)
        earned = tuple(statistics.fmean(each) for each in per_set)
        return cls(
            model=model,
            keys=tuple(keys),
            seconds=seconds,
            n=floats.n,
            accuracy=statistics.fmean(earned),
            interval=wilson_interval(sum(earned), len(earned)),
            accuracies=tuple(score.accuracy for score in scores),
            against_float=_points(floats.credits, earned),
            against_baseline=None if baseline is None else _points(baseline.credits, earned),
            credits=earned,
        )

    def spell(self) -> str:
        """The row in Markdown."""
        low, high = self.interval
        each = " / ".join(f"{100 * value:.1f}" for value in self.accuracies)
        cells = (
            *self.keys,
            f"{100 * self.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
            each,
            _spell_points(self.against_float),
            _spell_points(self.against_baseline),
            f"{self.seconds:.0f}",
        )
        return f"| {' | '.join(cells)} |"


def _points(baseline: Sequence[float], candidate: Sequence[float]) -> Points:
    paired = compare_paired(baseline, candidate)
    return (100 * paired.difference, 100 * paired.interval_low, 100 * paired.interval_high)


def _spell_points(points: Points | None) -> str:
    return "" if points is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*points)
