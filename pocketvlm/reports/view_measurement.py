"""The page's content about one measurement: how fast every arm was, and whether to believe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pocketvlm.reports.elements import Badge, Table, numbers, words
from pocketvlm.reports.entries import name_device
from pocketvlm.reports.formatting import facts_of, format_bytes, format_number, text_of
from pocketvlm.reports.measurement import Environment, MeasuredArm, MeasuredWorkload, Measurement
from pocketvlm.reports.view_health import HealthView, view_health
from pocketvlm.reports.view_latency import LatencyView, Role, role_of, view_latency
from pocketvlm.reports.view_memory import MemoryView, view_memory

__all__ = ["MeasurementView", "view_measurement", "view_verdicts"]


@dataclass(frozen=True, kw_only=True)
class MeasurementView:
    """One interleaved run on one device; `bundles` are (arm, role, facts)."""

    device: str
    caption: str
    badges: tuple[Badge, ...]
    notes: tuple[str, ...]
    latency: LatencyView
    memory: MemoryView | None
    health: HealthView
    bundles: tuple[tuple[str, Role, tuple[tuple[str, str], ...]], ...]
    failures: Table | None
    plausibility: Table | None
    broken: int
    environment: tuple[tuple[str, str], ...]


def view_measurement(bench: Measurement, machine: Environment) -> MeasurementView | None:
    """A measurement, or `None` if nothing was measured.

    Args:
        bench: The measurement.
        machine: The machine of the run, for a measurement that names none.
    """
    if not bench.arms:
        return None
    environment = bench.environment or machine
    return MeasurementView(
        device=name_device(environment),
        caption=_describe_workload(bench),
        badges=view_verdicts(bench),
        notes=bench.notes,
        latency=view_latency(bench),
        memory=view_memory(bench.arms),
        health=view_health(bench.arms),
        bundles=tuple(
            (name, role_of(bench, name), _view_bundle(arm)) for name, arm in bench.arms.items()
        ),
        failures=_failures(bench.arms),
        plausibility=_plausibility(bench.arms),
        broken=_count_broken(bench),
        environment=facts_of(environment.facts),
    )


def view_verdicts(bench: Measurement) -> tuple[Badge, ...]:
    """What must be known before a figure is believed."""
    badges = []
    steady = [arm.stability.is_stable for arm in bench.arms.values() if arm.stability is not None]
    if steady:
        badges.append(
            Badge(text="quiet machine", tone="good")
            if all(steady)
            else Badge(text="noisy run: speed is provisional", tone="warn")
        )
    if any(arm.plausibility for arm in bench.arms.values()):
        broken = _count_broken(bench)
        badges.append(
            Badge(text=f"{broken} implausible figures", tone="bad")
            if broken
            else Badge(text="figures plausible", tone="good")
        )
    failures = sum(len(arm.failures) for arm in bench.arms.values())
    if failures:
        what = "process" if failures == 1 else "processes"
        badges.append(Badge(text=f"{failures} {what} failed", tone="bad"))
    return tuple(badges)


def _count_broken(bench: Measurement) -> int:
    checks = [check for arm in bench.arms.values() for check in arm.plausibility]
    return sum(check.verdict == "fail" for check in checks)


def _describe_workload(bench: Measurement) -> str:
    """The workload in two sentences."""
    workload = bench.workload or MeasuredWorkload()
    if workload.name is None:
        return ""
    picture = _describe_pictures(workload)
    if picture:
        counts = {arm.prompt.visual_tokens for arm in bench.arms.values() if arm.prompt is not None}
        visual = " or ".join(text_of(count) for count in sorted(counts, key=lambda n: n or 0))
        picture += f" ({visual} visual tokens) + " if visual else " + "
    end = "end tokens ignored" if workload.ignore_eos else "stops at the end token"
    return (
        f"Workload “{workload.name}”: {picture}{text_of(workload.prompt_tokens)} text tokens, "
        f"{text_of(workload.new_tokens)} generated ({end}). Arms take turns, each in "
        f"{text_of(workload.repeats)} fresh processes that answer {text_of(workload.warm_ups)} + "
        f"{text_of(workload.answers)} times: warm-up, then measured."
    )


def _describe_pictures(workload: MeasuredWorkload) -> str:
    if workload.image_files:
        return f"picture {', '.join(workload.image_files)}"
    if workload.image_size:
        count = workload.pictures or 1
        many = "one" if count == 1 else str(count)
        size = f"{workload.image_size}×{workload.image_size}"
        return f"{many} {size} picture{'' if count == 1 else 's'}"
    return ""


def _view_bundle(arm: MeasuredArm) -> tuple[tuple[str, str], ...]:
    """How the bundle of an arm is stored."""
    bundle = arm.bundle
    return (
        ("runtime", text_of(arm.runtime)),
        *bundle.precision.items(),
        ("KV cache", text_of(bundle.kv_dtype)),
        ("positions", text_of(bundle.max_positions)),
        (
            "visual tokens",
            f"{text_of(bundle.visual_tokens)} of {text_of(bundle.visual_tokens_full)}",
        ),
        ("on disk", format_bytes(bundle.stored_bytes)),
    )


def _failures(arms: Mapping[str, MeasuredArm]) -> Table | None:
    rows = tuple(
        (
            name,
            "–" if failure.repeat is None else str(failure.repeat + 1),
            str(failure.answers),
            text_of(failure.reason),
        )
        for name, arm in arms.items()
        for failure in arm.failures
    )
    return (
        Table(
            caption="Processes that returned no result; answers that had arrived are counted",
            columns=(*words("Arm"), *numbers("Repeat", "Answers"), *words("Reason")),
            rows=rows,
        )
        if rows
        else None
    )


def _plausibility(arms: Mapping[str, MeasuredArm]) -> Table | None:
    rows = tuple(
        (
            name,
            text_of(check.check),
            "–" if check.value is None else format_number(check.value),
            "–" if check.bound is None else format_number(check.bound),
            text_of(check.verdict),
            check.detail,
        )
        for name, arm in arms.items()
        for check in arm.plausibility
    )
    return (
        Table(
            caption="Checks of every arm against physics and against its other figures",
            columns=(
                *words("Arm", "Check"),
                *numbers("Value", "Bound"),
                *words("Verdict", "Detail"),
            ),
            rows=rows,
        )
        if rows
        else None
    )
