"""A comparison as a table for a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from pocketvlm.device_bench.gate.verdicts import Comparison
from pocketvlm.reports.elements import Table, numbers, words
from pocketvlm.reports.formatting import format_figure, format_share

__all__ = ["tabulate"]


def tabulate(rows: Sequence[Comparison]) -> tuple[str, Table]:
    """A heading with the outcome, and one row per figure."""
    failed = [row for row in rows if not row.passed]
    noisy = sum(row.verdict == "too noisy" for row in failed)
    worse = len(failed) - noisy
    if worse:
        title = f"Worse than allowed: {worse} of {len(rows)} figures"
    elif noisy:
        title = f"Too noisy to tell: {noisy} of {len(rows)} figures"
    else:
        title = "No figure is worse than allowed"
    return title, Table(
        caption="Changes are shares of the first value, in brackets their 98 % intervals; timings "
        "are those of undisturbed processes.",
        columns=(
            *words("Figure"),
            *numbers("Before", "After", "Change", "Allowed"),
            *words("Verdict"),
        ),
        rows=tuple(_row(row) for row in rows),
    )


def _row(row: Comparison) -> tuple[str, ...]:
    verdict = row.verdict if row.passed else row.verdict.upper()
    return (
        row.name,
        _value(row.metric, row.first),
        _value(row.metric, row.second),
        row.change or "–",
        f"{row.bound:.1%}",
        f"{verdict}: {row.reason}" if row.reason else verdict,
    )


def _value(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    return (
        format_share(value) if metric in ("accuracy", "recovery") else format_figure(metric, value)
    )
