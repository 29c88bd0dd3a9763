"""The content of a report's page, computed from the report; the template draws it.

A block that is missing becomes "not measured", and the notes of all blocks are collected in one
place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pocketvlm.reports.charts import Bar
from pocketvlm.reports.formatting import (
    NOT_MEASURED,
    facts_of,
    format_bytes,
    format_figure,
    format_share,
    text_of,
)
from pocketvlm.reports.measurement import (
    Environment,
    Latency,
    MeasuredArm,
    Measurement,
    Memory,
)
from pocketvlm.reports.report import Quality, Report, Size
from pocketvlm.reports.view_artifact import (
    Badge,
    ParityView,
    QualityView,
    SizeView,
    view_parity,
    view_quality,
    view_size,
    view_source,
)
from pocketvlm.reports.view_latency import TargetLatency, spell_ratio, view_latency
from pocketvlm.reports.view_measurement import (
    describe_memory,
    describe_workload,
    view_bundle,
    view_memory,
    view_plausibility,
)
from pocketvlm.reports.view_stage import StageView, view_stage

__all__ = ["RunView", "Tile", "view_run"]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A headline figure."""

    label: str
    value: str
    unit: str
    detail: str
    is_measured: bool


@dataclass(frozen=True, kw_only=True)
class RunView:
    """The content of the page for one report."""

    title: str
    recipe: str
    machine: str
    badges: tuple[Badge, ...]
    tiles: tuple[Tile, ...]
    failures: tuple[str, ...]
    notes: tuple[str, ...]
    size: SizeView | None
    quality: QualityView | None
    source: ParityView | None
    parity: tuple[ParityView, ...]
    unverified: tuple[tuple[str, str], ...]
    latency: tuple[TargetLatency, ...]
    latency_caption: str
    bundles: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...]
    memory_bars: tuple[Bar, ...]
    memory_caption: str
    plausibility: tuple[tuple[str, str, str, str, str, str], ...]
    stages: tuple[StageView, ...]
    environment: tuple[tuple[str, str], ...]
    provenance: tuple[tuple[str, str], ...]
    commands: tuple[str, ...]


def view_run(report: Report) -> RunView:
    """Computes the content of the page of a report, or of a measurement alone."""
    bench = report.bench
    latency = report.latency or {name: arm.latency for name, arm in bench.compared.items()}
    environment = bench.environment or report.environment
    return RunView(
        title=_title(report),
        recipe=_recipe(report),
        machine=_machine(environment),
        badges=_badges(report),
        tiles=_tiles(report, latency),
        failures=report.failures,
        notes=_notes(report),
        size=view_size(report.size, _baseline(bench).bundle),
        quality=view_quality(report.quality),
        source=view_source(report.source_check),
        parity=view_parity(report.parity),
        unverified=facts_of(report.parity.unverified) if report.parity else (),
        latency=view_latency(bench, latency),
        latency_caption=describe_workload(bench),
        bundles=tuple(
            (
                "candidate" if name in bench.compared else "baseline",
                name,
                view_bundle(arm.bundle),
            )
            for name, arm in bench.arms.items()
        ),
        memory_bars=view_memory(bench, report.memory),
        memory_caption=describe_memory(report.memory),
        plausibility=view_plausibility(bench),
        stages=tuple(view_stage(stage) for stage in report.stages),
        environment=facts_of(environment.facts),
        provenance=_provenance(report),
        commands=_commands(report),
    )


def _title(report: Report) -> str:
    return report.model.name or _candidate(report.bench).bundle.model or "unnamed model"


def _candidate(bench: Measurement) -> MeasuredArm:
    """The arm that headline figures are of: the first beside the reference."""
    return next(iter(bench.compared.values()), MeasuredArm())


def _baseline(bench: Measurement) -> MeasuredArm:
    """The arm that it is compared with; an empty one if there is no other."""
    alone = bench.reference in bench.compared
    return MeasuredArm() if alone else bench.arms.get(bench.reference or "", MeasuredArm())


def _recipe(report: Report) -> str:
    if report.recipe is None:
        return ""
    return ": ".join(filter(None, (report.recipe.name, report.recipe.description)))


def _machine(environment: Environment) -> str:
    if not environment.processor:
        return ""
    threads = f", {environment.threads} threads" if environment.threads else ""
    return f"measured on {environment.processor}{threads}"


def _badges(report: Report) -> tuple[Badge, ...]:
    badges = []
    source = view_source(report.source_check)
    if source is not None:
        badges.append(Badge(text=f"source {source.badge.text}", tone=source.badge.tone))
    if report.parity is None:
        badges.append(Badge(text=f"parity {NOT_MEASURED}", tone="plain"))
    elif report.parity.passed:
        badges.append(Badge(text="parity passed", tone="good"))
    else:
        badges.append(Badge(text="parity FAILED", tone="bad"))
    if report.failures:
        badges.append(Badge(text=f"{len(report.failures)} checks or bounds failed", tone="bad"))
    bench = report.bench
    stability = bench.arms.get(bench.reference or "", MeasuredArm()).stability
    checks = [check for arm in bench.arms.values() for check in arm.plausibility]
    if stability is not None:
        badges.append(
            Badge(text="quiet machine", tone="good")
            if stability.is_stable
            else Badge(text="noisy run: speed is provisional", tone="warn")
        )
    if checks:
        broken = sum(check.verdict == "fail" for check in checks)
        badges.append(
            Badge(text=f"{broken} implausible figures", tone="bad")
            if broken
            else Badge(text="figures plausible", tone="good")
        )
    return tuple(badges)


def _tiles(report: Report, latency: Mapping[str, Latency]) -> tuple[Tile, ...]:
    first = next(iter(latency.values()), Latency())
    candidate, baseline = _candidate(report.bench), _baseline(report.bench)
    return (
        _size_tile(report.size, candidate.bundle.stored_bytes),
        _quality_tile(report.quality),
        _latency_tile("First token, user", "ttft_user_ms", first, candidate.ratios),
        _latency_tile("Decode", "decode_tok_s", first, candidate.ratios),
        _memory_tile(report.memory, candidate.memory, baseline.memory),
    )


def _size_tile(size: Size, stored_bytes: int | None) -> Tile:
    bundle = stored_bytes if size.bundle_bytes is None else size.bundle_bytes
    source = size.source_bytes
    detail = "everything an app ships"
    if bundle and source:
        detail = f"{format_share(bundle / source)} of the source's {format_bytes(source)}"
    return _tile("Bundle on disk", None if bundle is None else format_bytes(bundle), detail)


def _latency_tile(label: str, name: str, latency: Latency, ratios: Mapping[str, float]) -> Tile:
    figure, ratio = latency.figure(name), ratios.get(name)
    beside = (
        f"; in pairs {spell_ratio(name, ratio)} the baseline"
        if ratio
        else ", no baseline in this run"
    )
    return _tile(
        label,
        None if figure.median is None else format_figure(name, figure.median),
        f"median of {len(figure.samples)}{beside}",
    )


def _memory_tile(memory: Memory, measured: Memory, baseline: Memory) -> Tile:
    peak = memory.peak_rss_bytes or measured.peak_rss_bytes
    detail = "resident, process with this bundle alone"
    if baseline.peak_rss_bytes:
        detail += f"; baseline {format_bytes(baseline.peak_rss_bytes)}"
    return _tile("Peak memory", None if peak is None else format_bytes(peak), detail)


def _quality_tile(quality: Quality | None) -> Tile:
    if quality is None or quality.compressed.accuracy is None:
        return _tile("Answers right", None, "")
    plain, blind, n = quality.uncompressed.accuracy, quality.blind, quality.n
    pieces = ["from the bundle"]
    if plain is not None:
        pieces.append(f"float {format_share(plain)}")
    pieces.append(f"blind floor {format_share(blind)}" if blind is not None else "no blind floor")
    pieces.append(f"n = {n:,.0f}" if n is not None else "n unknown")
    return _tile("Answers right", format_share(quality.compressed.accuracy), ", ".join(pieces))


def _tile(label: str, value: str | None, detail: str) -> Tile:
    if value is None:
        return Tile(label=label, value=NOT_MEASURED, unit="", detail="", is_measured=False)
    amount, _, unit = value.partition(" ")
    return Tile(label=label, value=amount, unit=unit, detail=detail, is_measured=True)


def _notes(report: Report) -> tuple[str, ...]:
    """All notes of the report, its stages and the benchmark, without duplicates."""
    notes = list(report.notes)
    for stage in report.stages:
        notes += [f"{stage.method}: {note}" for note in stage.notes]
        kept = Counter(
            str(layer["reason"])
            for layer in stage.layers
            if layer.get("reason") and layer.get("bits") is None
        )
        notes += [
            f"{stage.method}: {count} {'layer stays' if count == 1 else 'layers stay'} float: {why}"
            for why, count in kept.items()
        ]
    notes += report.bench.notes
    return tuple(dict.fromkeys(notes))


def _provenance(report: Report) -> tuple[tuple[str, str], ...]:
    facts = list(facts_of(report.model.facts))
    facts += [
        (f"{target} needs", f"{text_of(needs.runtime)} {text_of(needs.lowest_version)} or newer")
        for target, needs in report.runtimes.items()
    ]
    if report.recipe is not None:
        recipe = report.recipe
        facts.append(("recipe", f"{text_of(recipe.name)}, {text_of(recipe.sha256)}"))
    facts += [(f"calibration {name}", text) for name, text in facts_of(report.calibration)]
    return tuple(facts)


def _commands(report: Report) -> tuple[str, ...]:
    bench = report.bench
    commands = [report.command] if report.command else []
    if bench.workload is not None and bench.workload.name:
        alone = bench.reference in bench.compared
        baseline = "" if alone else " --baseline FLOAT_BUNDLE"
        commands.append(f"pocketvlm bench BUNDLE --workload {bench.workload.name}{baseline}")
    commands.append('pocketvlm ask BUNDLE --image photo.jpg --prompt "What is in the picture?"')
    return tuple(commands)
