"""The verdict on one figure of A and B.

A timing regresses when the whole interval of its regression lies beyond the bound, and passes when
the whole interval lies within; when the bound is inside the interval, the measurement was too noisy
to tell. A process is represented by its undisturbed time, the tenth of its samples that are best:
neighbours on a machine only ever add time. Sizes, peaks and scores are one number each, held to the
bound as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

from pocketvlm.device_bench.gate.bootstrap import (
    LEAST_PROCESSES,
    Interval,
    interval_of_pairs,
    interval_of_samples,
)
from pocketvlm.device_bench.gate.bounds import is_absolute, is_better_when_higher
from pocketvlm.reports.measurement import Figure

__all__ = ["Comparison", "judge_amount", "judge_figure"]

Verdict = Literal["ok", "regressed", "too noisy", "missing", "not comparable", "not measured"]

_ROUNDING = 1e-9  # errors of decimal fractions must not decide


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure of A and B.

    Attributes:
        metric: Its name.
        arm: The runtime or the arm that it was measured on; `None` for the whole bundle.
        first: Its value in A.
        second: Its value in B.
        regression: How much worse B is, as a share of A (accuracy, recovery: absolute); negative if
            it is better.
        low: Lower end of the regression's 98 % interval; `None` for a figure without one.
        high: Upper end.
        processes: Pairs of processes, or processes of the smaller run, that the interval is from.
        bound: How much worse it may be.
        verdict: The outcome.
        reason: Why, if the numbers do not show it.
    """

    metric: str
    arm: str | None
    first: float | None
    second: float | None
    regression: float | None = None
    low: float | None = None
    high: float | None = None
    processes: int | None = None
    bound: float
    verdict: Verdict
    reason: str = ""

    @property
    def name(self) -> str:
        """The metric, and what it was measured on."""
        return self.metric if self.arm is None else f"{self.arm} {self.metric}"

    @property
    def passed(self) -> bool:
        """Whether this figure allows a release of B."""
        return self.verdict in ("ok", "not measured")

    @property
    def change(self) -> str:
        """The regression in words, with its interval; empty if there is none."""
        if self.regression is None:
            return ""
        sign = 1 if self.regression > 0 else -1
        text = f"{'worse' if sign > 0 else 'better'} by {abs(self.regression):.1%}"
        if self.low is None or self.high is None:
            return text if self.regression else "no change"
        near, far = sorted((sign * self.low, sign * self.high))
        return f"{text} ({near:.1%} to {far:.1%})"

    def line(self) -> str:
        """The row as text."""
        if self.first is None or self.second is None or self.regression is None:
            return f"{self.name:<28} {self.verdict}: {self.reason}"
        detail = f" ({self.reason})" if self.reason else ""
        return (
            f"{self.name:<28} {self.first:>12,.4g} -> {self.second:>12,.4g}  {self.change:<38} "
            f"allowed {self.bound:.1%}  {self.verdict}{detail}"
        )

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        return {**asdict(self), "passed": self.passed}


def judge_amount(
    metric: str,
    arm: str | None,
    bound: float,
    first: float | None,
    second: float | None,
    obstacle: str = "",
) -> Comparison:
    """The verdict on a figure that is one number in A and one in B.

    Args:
        metric: Its name.
        arm: What it was measured on.
        bound: How much worse B may be.
        first: Its value in A.
        second: Its value in B.
        obstacle: Why the two cannot be compared; empty if they can.
    """
    row = Comparison(
        metric=metric, arm=arm, first=first, second=second, bound=bound, verdict="not measured"
    )
    if first is None:
        return replace(row, reason="A has no such figure to compare with")
    if second is None:
        return replace(row, verdict="missing", reason="A has this figure and B lacks it")
    if obstacle:
        return replace(row, verdict="not comparable", reason=obstacle)
    worse_by = first - second if is_better_when_higher(metric) else second - first
    regression = worse_by if is_absolute(metric) else _share(worse_by, first)
    is_within = regression <= bound + _ROUNDING
    return replace(row, regression=regression, verdict="ok" if is_within else "regressed")


def judge_figure(
    metric: str,
    arm: str,
    bound: float,
    first: Figure,
    second: Figure,
    *,
    is_interleaved: bool,
    obstacle: str = "",
) -> Comparison:
    """The verdict on a timing, by the interval of its regression.

    Args:
        metric: Its name.
        arm: What it was measured on.
        bound: How much worse B may be.
        first: Its samples in A.
        second: Its samples in B.
        is_interleaved: Whether processes of A and B alternated, so that repeats make pairs.
        obstacle: Why the two cannot be compared; empty if they can.
    """
    row = judge_amount(metric, arm, bound, _undisturbed(first), _undisturbed(second), obstacle)
    if row.regression is None:
        return row
    interval = _interval(first.by_repeat, second.by_repeat, is_interleaved=is_interleaved)
    if isinstance(interval, str):
        return replace(row, verdict="too noisy", reason=interval)
    regression, low, high = _regressions(metric, interval)
    return replace(
        row,
        regression=regression,
        low=low,
        high=high,
        processes=interval.processes,
        verdict=_verdict(low, high, bound + _ROUNDING),
        reason="" if is_interleaved else "not interleaved: drift between the runs is not in it",
    )


def _verdict(low: float, high: float, bound: float) -> Verdict:
    if low > bound:
        return "regressed"
    return "ok" if high <= bound else "too noisy"


def _undisturbed(figure: Figure) -> float | None:
    """The median over processes of what each does when left alone; the plain one without them."""
    values = [value for value in figure.by_repeat if value is not None]
    return median(values) if values else figure.median


def _interval(
    first: Sequence[float | None], second: Sequence[float | None], *, is_interleaved: bool
) -> Interval | str:
    """The interval of B's figure divided by A's, or why there is none."""
    ours = [value for value in first if value is not None]
    theirs = [value for value in second if value is not None]
    if is_interleaved:
        pairs = [
            (one, other)
            for one, other in zip(first, second, strict=False)
            if one is not None and other is not None
        ]
        ours, theirs = [one for one, _ in pairs], [other for _, other in pairs]
    if min(len(ours), len(theirs)) < LEAST_PROCESSES:
        what = "pairs of processes" if is_interleaved else "processes"
        return f"{min(len(ours), len(theirs))} {what}; an interval needs {LEAST_PROCESSES}"
    return (interval_of_pairs if is_interleaved else interval_of_samples)(ours, theirs)


def _regressions(metric: str, interval: Interval) -> tuple[float, float, float]:
    """The regression, its lower end and its upper end, as shares of A."""
    if is_better_when_higher(metric):
        return 1 - interval.ratio, 1 - interval.high, 1 - interval.low
    return interval.ratio - 1, interval.low - 1, interval.high - 1


def _share(difference: float, of: float) -> float:
    if of == 0:
        return 1.0 if difference > 0 else 0.0
    return difference / abs(of)
