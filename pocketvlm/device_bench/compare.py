"""A release gate: is report B worse than report A by more than is allowed?

A bound is a share of A (`decode_tok_s=0.05`), or an absolute difference for accuracy and recovery
(`accuracy=0.01` is one percentage point). A figure that A has and B lacks fails the gate. So do
latencies of different workloads or machines, which cannot be compared: otherwise a gate could pass
without having compared anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pocketvlm.errors import InputError
from pocketvlm.reports.measurement import Latency, MeasuredArm, MeasuredWorkload
from pocketvlm.reports.report import Quality, Report
from pocketvlm.reports.report_file import read_report

__all__ = ["DEFAULT_BOUNDS", "Comparison", "compare_files", "compare_reports", "parse_bounds"]

Verdict = Literal["ok", "regressed", "missing", "not comparable", "not measured"]

DEFAULT_BOUNDS: Mapping[str, float] = {
    "bundle_bytes": 0.02,
    "peak_rss_bytes": 0.10,
    "accuracy": 0.01,
    "ttft_user_ms": 0.10,
    "ttft_engine_ms": 0.10,
    "prefill_tok_s": 0.10,
    "decode_tok_s": 0.10,
}
"""Allowed regression by figure, unless the caller gives another."""

_HIGHER_IS_BETTER = ("_tok_s", "accuracy", "recovery")
_LATENCY = (
    "load_ms",
    "cold_ttft_user_ms",
    "preprocess_ms",
    "vision_ms",
    "tokenize_ms",
    "embed_ms",
    "prefill_ms",
    "decode_ms",
    "sample_ms",
    "detokenize_ms",
    "ttft_user_ms",
    "ttft_engine_ms",
    "prefill_tok_s",
    "decode_tok_s",
)
_METRICS = ("bundle_bytes", "peak_rss_bytes", "accuracy", "recovery", *_LATENCY)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure of both reports.

    Attributes:
        metric: Its name.
        target: The target that it was measured on, or `None` for the whole bundle.
        first: Its value in A.
        second: Its value in B.
        regression: How much worse B is, as a share of A (accuracy, recovery: absolute); negative if
            it is better.
        bound: How much worse it may be.
        verdict: The outcome.
        reason: Why, if the numbers do not show it.
    """

    metric: str
    target: str | None
    first: float | None
    second: float | None
    regression: float | None
    bound: float
    verdict: Verdict
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether this figure allows a release of B."""
        return self.verdict in ("ok", "not measured")

    def line(self) -> str:
        """The row as text."""
        name = self.metric if self.target is None else f"{self.target} {self.metric}"
        if self.first is None or self.second is None or self.regression is None:
            return f"{name:<28} {self.verdict}: {self.reason}"
        change = (
            f"worse by {self.regression:.1%}"
            if self.regression > 0
            else f"better by {-self.regression:.1%}"
        )
        detail = f" ({self.reason})" if self.reason else ""
        return (
            f"{name:<28} {self.first:>14,.4g} -> {self.second:>14,.4g}  {change:<18} "
            f"allowed {self.bound:.1%}  {self.verdict}{detail}"
        )

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        return {**asdict(self), "passed": self.passed}


def parse_bounds(texts: Iterable[str]) -> dict[str, float]:
    """Parses `METRIC=SHARE` texts into bounds, on top of the defaults; `5%` means 0.05.

    Raises:
        InputError: A metric is unknown, or a share is not a number of at least 0.
    """
    bounds = dict(DEFAULT_BOUNDS)
    for text in texts:
        name, _, share = text.partition("=")
        if name not in _METRICS:
            raise InputError(
                f"--max-regress {text!r}: metric {name!r} is not known; there are "
                f"{', '.join(_METRICS)}"
            )
        try:
            value = float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
        except ValueError as error:
            raise InputError(
                f"--max-regress {text!r}: {share!r} is not a share; write {name}=0.05 or {name}=5%"
            ) from error
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"--max-regress {text!r}: the share must be 0 or more")
        bounds[name] = value
    return bounds


def compare_files(
    first: Path, second: Path, bounds: Mapping[str, float] | None = None
) -> tuple[Comparison, ...]:
    """Compares two report files, or the report.json of two run folders.

    The document of `pocketvlm bench` is accepted like a run report.

    Raises:
        InputError: One of them cannot be read, or is not a report.
    """
    return compare_reports(read_report(first), read_report(second), bounds)


def compare_reports(
    first: Report, second: Report, bounds: Mapping[str, float] | None = None
) -> tuple[Comparison, ...]:
    """Compares two reports, figure by figure, in the order of the bounds.

    Args:
        first: The reference, A.
        second: What must not be worse, B.
        bounds: How much worse each figure may be; `None` for the defaults.
    """
    rows = []
    obstacle = _obstacle(first, second)
    timed = sorted({*_latency(first), *_latency(second)})
    for metric, bound in (DEFAULT_BOUNDS if bounds is None else bounds).items():
        if metric not in _LATENCY:
            values = _value(first, metric), _value(second, metric)
            rows.append(_judge(metric, None, values, bound, ""))
            continue
        for target in timed or (None,):
            values = _median(first, target, metric), _median(second, target, metric)
            rows.append(_judge(metric, target, values, bound, obstacle))
    return tuple(rows)


def _judge(
    metric: str,
    target: str | None,
    values: tuple[float | None, float | None],
    bound: float,
    obstacle: str,
) -> Comparison:
    first, second = values
    regression: float | None = None
    verdict: Verdict
    reason = ""
    if first is None:
        verdict, reason = "not measured", "A has no such figure to compare with"
    elif second is None:
        verdict, reason = "missing", "A has this figure and B lacks it"
    elif obstacle:
        verdict, reason = "not comparable", obstacle
    else:
        worse_by = first - second if metric.endswith(_HIGHER_IS_BETTER) else second - first
        regression = worse_by if metric in ("accuracy", "recovery") else _share(worse_by, first)
        # Rounding errors of decimal fractions must not decide.
        verdict = "ok" if regression <= bound + 1e-9 else "regressed"
    return Comparison(
        metric=metric,
        target=target,
        first=first,
        second=second,
        regression=regression,
        bound=bound,
        verdict=verdict,
        reason=reason,
    )


def _share(difference: float, of: float) -> float:
    if of == 0:
        return 1.0 if difference > 0 else 0.0
    return difference / abs(of)


def _latency(report: Report) -> Mapping[str, Latency]:
    return report.latency or {name: arm.latency for name, arm in report.bench.compared.items()}


def _median(report: Report, target: str | None, metric: str) -> float | None:
    if target is None:
        return None
    return _latency(report).get(target, Latency()).figure(metric).median


def _value(report: Report, metric: str) -> float | None:
    """A figure of the whole bundle."""
    quality = report.quality or Quality()
    measured = next(iter(report.bench.compared.values()), MeasuredArm())
    stored, total = measured.bundle.stored_bytes, report.size.bundle_bytes
    peak = report.memory.peak_rss_bytes or measured.memory.peak_rss_bytes
    values = {
        "bundle_bytes": stored if total is None else total,
        "peak_rss_bytes": peak,
        "accuracy": quality.compressed.accuracy,
        "recovery": quality.recovery,
    }
    value = values[metric]
    return None if value is None else float(value)


def _obstacle(first: Report, second: Report) -> str:
    """Why latencies of two reports cannot be compared; empty if they can."""
    conditions = zip(_conditions(first).items(), _conditions(second).values(), strict=True)
    for (name, ours), theirs in conditions:
        if ours != theirs:
            return f"{name}: {ours!r} and {theirs!r}"
    return ""


def _conditions(report: Report) -> Mapping[str, str | int | None]:
    """What must be equal in two measurements, by the message for a difference."""
    workload = report.bench.workload or MeasuredWorkload()
    environment = report.bench.environment or report.environment
    return {
        "workload differs in prompt_tokens": workload.prompt_tokens,
        "workload differs in new_tokens": workload.new_tokens,
        "workload differs in image_size": workload.image_size,
        "workload differs in pictures": workload.pictures,
        "workload differs in image_sha256": ", ".join(workload.image_sha256),
        "workload differs in turns": workload.turns,
        "environment differs in processor": environment.processor,
        "environment differs in machine": environment.machine,
        "environment differs in cores": environment.cores,
        "environment differs in threads": environment.threads,
        "environment differs in device": environment.device,
    }
