"""A release gate: is B worse than A by more than is allowed, or can nobody tell?

A bound is a share of A (`decode_tok_s=0.05`), or an absolute difference for accuracy and recovery
(`accuracy=0.01` is one percentage point). A figure that A has and B lacks fails the gate. So do
latencies of different workloads or machines, and figures that are not plausible: otherwise a gate
could pass without having compared anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pocketvlm.device_bench.gate.bounds import DEFAULT_BOUNDS, TIMINGS
from pocketvlm.device_bench.gate.verdicts import Comparison, judge_amount, judge_figure
from pocketvlm.errors import InputError
from pocketvlm.reports.measurement import MeasuredArm, MeasuredWorkload
from pocketvlm.reports.report import Quality, Report
from pocketvlm.reports.report_file import read_report

__all__ = ["compare_arms", "compare_files", "compare_reports"]


def compare_files(
    first: Path,
    second: Path | None = None,
    *,
    arms: tuple[str, str] | None = None,
    bounds: Mapping[str, float] = DEFAULT_BOUNDS,
) -> tuple[Comparison, ...]:
    """Compares two reports, or the arms of one.

    Args:
        first: A report file, the folder of a run, or the document of `pocketvlm bench`.
        second: Another; `None` to compare the arms of the first.
        arms: Names of two arms of the first, A and B; `None` for every arm beside the reference.
        bounds: How much worse each figure may be.

    Raises:
        InputError: A file cannot be read, is not a report, is of several workloads, or has no such
            arms.
    """
    if second is not None:
        if arms is not None:
            raise InputError("--arms names two arms of one report; leave out the second report")
        return compare_reports(_read(first), _read(second), bounds)
    report = _read(first)
    try:
        return compare_arms(report, arms, bounds)
    except InputError as error:
        raise InputError(f"{first}: {error}") from error


def _read(file: Path) -> Report:
    report = read_report(file)
    if report.grid:
        count = 1 + len(report.grid)
        raise InputError(f"{file}: is of {count} workloads; compare documents of one workload each")
    return report


def compare_reports(
    first: Report, second: Report, bounds: Mapping[str, float] = DEFAULT_BOUNDS
) -> tuple[Comparison, ...]:
    """Compares two reports whose runs were not interleaved, in the order of the bounds.

    Args:
        first: The reference, A.
        second: What must not be worse, B.
        bounds: How much worse each figure may be.
    """
    obstacle = _obstacle(first, second)
    ours, theirs = _timed_arms(first), _timed_arms(second)
    rows: list[Comparison] = []
    for metric, bound in bounds.items():
        if metric not in ("peak_rss_bytes", *TIMINGS):
            amounts = _amount(first, metric), _amount(second, metric)
            rows.append(judge_amount(metric, None, bound, *amounts))
            continue
        for name in dict.fromkeys([*ours, *theirs]):
            pair = ours.get(name, MeasuredArm()), theirs.get(name, MeasuredArm())
            rows.append(
                _judge_arms(metric, name, bound, pair, is_interleaved=False, obstacle=obstacle)
            )
    return tuple(rows)


def compare_arms(
    report: Report,
    arms: tuple[str, str] | None = None,
    bounds: Mapping[str, float] = DEFAULT_BOUNDS,
) -> tuple[Comparison, ...]:
    """Compares arms of one run, whose processes were interleaved.

    Args:
        report: A measurement of at least two arms.
        arms: Names of A and B; `None` compares every other arm with the reference.
        bounds: How much worse each figure may be.

    Raises:
        InputError: There are no two arms, or one of the names is not an arm.
    """
    known = report.bench.arms
    return tuple(
        _judge_arms(metric, second, bound, (known[first], known[second]), is_interleaved=True)
        for first, second in _chosen_arms(report, arms)
        for metric, bound in bounds.items()
        if metric in ("bundle_bytes", "peak_rss_bytes", *TIMINGS)
    )


def _chosen_arms(report: Report, arms: tuple[str, str] | None) -> Iterator[tuple[str, str]]:
    known, reference = report.bench.arms, report.bench.reference
    if arms is not None:
        for name in arms:
            if name not in known:
                raise InputError(f"has no arm {name!r}; there are {', '.join(known) or 'none'}")
        yield arms
    elif reference is None or len(known) < 2:  # noqa: PLR2004  (a comparison has two sides)
        raise InputError("has no two arms of one run to compare; give a second report")
    else:
        yield from ((reference, name) for name in known if name != reference)


def _judge_arms(
    metric: str,
    name: str,
    bound: float,
    arms: tuple[MeasuredArm, MeasuredArm],
    *,
    is_interleaved: bool,
    obstacle: str = "",
) -> Comparison:
    """A figure of two arms; `obstacle` is why their timings cannot be compared."""
    first, second = arms
    if metric == "bundle_bytes":
        sizes = first.bundle.stored_bytes, second.bundle.stored_bytes
        return judge_amount(metric, name, bound, *sizes)
    if metric == "peak_rss_bytes":
        peaks = first.memory.peak_rss_bytes, second.memory.peak_rss_bytes
        return judge_amount(metric, name, bound, *peaks)
    if metric in first.withheld | second.withheld:
        obstacle = "it failed a plausibility check"
    return judge_figure(
        metric,
        name,
        bound,
        first.latency.figure(metric),
        second.latency.figure(metric),
        is_interleaved=is_interleaved,
        obstacle=obstacle,
    )


def _timed_arms(report: Report) -> Mapping[str, MeasuredArm]:
    """What a report is about, without its reference: by runtime, or by name if that is unclear."""
    arms = report.bench.compared
    by_runtime = {arm.runtime: arm for arm in arms.values() if arm.runtime is not None}
    if len(by_runtime) < len(arms):
        return arms
    return by_runtime


def _amount(report: Report, metric: str) -> float | None:
    """A figure of the whole bundle."""
    quality = report.quality or Quality()
    arms = tuple(report.bench.compared.values())
    stored = arms[0].bundle.stored_bytes if len(arms) == 1 else None
    values = {
        "bundle_bytes": report.size.bundle_bytes or stored,
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


def _conditions(report: Report) -> Mapping[str, object]:
    """What must be equal in two measurements, by the message for a difference."""
    workload = report.bench.workload or MeasuredWorkload()
    environment = report.bench.environment or report.environment
    return {
        "workload differs in prompt_tokens": workload.prompt_tokens,
        "workload differs in new_tokens": workload.new_tokens,
        "workload differs in image_size": workload.image_size,
        "workload differs in image_sha256": workload.image_sha256,
        "workload differs in pictures": workload.pictures,
        "workload differs in visual_tokens": workload.visual_tokens,
        "workload differs in resolution": workload.resolution,
        "workload differs in turns": workload.turns,
        "environment differs in processor": environment.processor,
        "environment differs in machine": environment.machine,
        "environment differs in cores": environment.cores,
        "environment differs in threads": environment.threads,
        "environment differs in device": environment.device,
    }
