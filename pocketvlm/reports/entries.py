"""What several reports say about the same bundle, joined: one entry for each bundle and runtime.

A run's report knows how well its bundle answers, and a benchmark how fast it is; the digest of the
manifest tells that both mean the same bundle. Speed is known under conditions, which are a device
and a workload: figures of different conditions never share a column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pocketvlm.reports.measurement import (
    Environment,
    MeasuredArm,
    MeasuredWorkload,
    Measurement,
)
from pocketvlm.reports.report import Report, Score

__all__ = ["Condition", "Entry", "join_reports", "name_device"]


@dataclass(frozen=True, kw_only=True, order=True)
class Condition:
    """Where and on what something was timed.

    Attributes:
        device: The device, as a reader would call it.
        workload: The shape of the workload, in a few words.
    """

    device: str
    workload: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One bundle on one runtime.

    Attributes:
        name: A short name.
        model: The model that it was made from.
        runtime: The target whose graphs are run.
        stored_bytes: What an app ships for this runtime.
        score: How well the bundle answers.
        has_parity: Whether its certificate passed.
        arms: Its measurements, by condition.
        failed: Why it could not be measured, by condition.
    """

    name: str
    model: str
    runtime: str
    stored_bytes: int | None = None
    score: Score | None = None
    has_parity: bool | None = None
    arms: Mapping[Condition, MeasuredArm] = field(default_factory=dict)
    failed: Mapping[Condition, str] = field(default_factory=dict)


def join_reports(reports: Sequence[Report]) -> tuple[Entry, ...]:
    """The entries of all reports, in the order in which they are first mentioned."""
    entries: dict[tuple[str, str], Entry] = {}
    for report in reports:
        for key, entry in _of_run(report):
            entries.setdefault(key, entry)
    for report in reports:
        for key, entry in _of_bench(report):
            known = entries.get(key, entry)
            entries[key] = replace(
                known,
                arms={**known.arms, **entry.arms},
                failed={**known.failed, **entry.failed},
            )
    return tuple(entries.values())


def name_device(environment: Environment) -> str:
    """The device's profile, or the processor of a host."""
    if environment.device is not None and environment.device != "host":
        return environment.device
    return environment.processor or environment.device or "unnamed device"


def _of_run(report: Report) -> Iterator[tuple[tuple[str, str], Entry]]:
    """What a run says about its own bundle: one entry for each target."""
    model, recipe = report.model.name or "unnamed model", report.recipe
    beside = report.size.parts.get("processor", 0)
    for runtime in report.runtimes:
        part = report.size.parts.get(runtime)
        certificate = None if report.parity is None else report.parity.targets.get(runtime)
        digest = report.bundle.manifest_sha256 if report.bundle else None
        name = f"{model} {recipe.name}" if recipe is not None and recipe.name else model
        yield (
            (digest or name, runtime),
            Entry(
                name=name,
                model=model,
                runtime=runtime,
                stored_bytes=report.size.bundle_bytes if part is None else part + beside,
                score=None if report.quality is None else report.quality.compressed,
                has_parity=None if certificate is None else certificate.passed,
            ),
        )


def _of_bench(report: Report) -> Iterator[tuple[tuple[str, str], Entry]]:
    """What a measurement says about its arms; without the baseline of a run."""
    for bench in (report.bench, *report.grid):
        condition = _condition(bench, report.environment)
        for name, arm in (bench.compared if report.runtimes else bench.arms).items():
            yield _of_arm(name, arm, condition)


def _of_arm(name: str, arm: MeasuredArm, condition: Condition) -> tuple[tuple[str, str], Entry]:
    reason = arm.latency.failed
    runtime = arm.runtime or "unnamed runtime"
    return (
        (arm.bundle.manifest_sha256 or name, runtime),
        Entry(
            name=name,
            model=arm.bundle.model or "unnamed model",
            runtime=runtime,
            stored_bytes=arm.bundle.stored_bytes,
            arms={condition: arm},
            failed={} if reason is None else {condition: reason},
        ),
    )


def _condition(bench: Measurement, environment: Environment) -> Condition:
    return Condition(
        device=name_device(bench.environment or environment),
        workload=_shape(bench.workload or MeasuredWorkload()),
    )


def _shape(workload: MeasuredWorkload) -> str:
    """The workload in a few words; two that differ in shape differ here."""
    pictures = workload.pictures or (1 if workload.image_size else 0)
    size = f" of {workload.image_size} px" if workload.image_size else ""
    shown = f", {pictures} picture{'s' if pictures > 1 else ''}{size}" if pictures else ""
    if workload.visual_tokens is not None:
        shown += f", {workload.visual_tokens} visual tokens per tile"
    if workload.resolution is not None:
        shown += ", vision graph of {} x {} pixels".format(*workload.resolution)
    turns = f", {workload.turns} turns" if (workload.turns or 1) > 1 else ""
    return (
        f"{workload.name or 'unnamed'}: {workload.prompt_tokens} tokens{shown}{turns}, "
        f"{workload.new_tokens} generated"
    )
