"""The page's content about one run: what was made, from what, and whether it can be trusted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pocketvlm.reports.elements import Badge
from pocketvlm.reports.formatting import (
    NOT_MEASURED,
    facts_of,
    format_bytes,
    format_figure,
    format_share,
    text_of,
)
from pocketvlm.reports.measurement import Environment, MeasuredArm, Measurement
from pocketvlm.reports.report import Quality, Report, Size
from pocketvlm.reports.view_artifact import (
    ParityView,
    QualityView,
    SizeView,
    view_parity,
    view_quality,
    view_size,
    view_source,
)
from pocketvlm.reports.view_latency import spell_ratio
from pocketvlm.reports.view_measurement import MeasurementView, view_measurement, view_verdicts
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
    measurements: tuple[MeasurementView, ...]
    compress_peak: str
    stages: tuple[StageView, ...]
    environment: tuple[tuple[str, str], ...]
    provenance: tuple[tuple[str, str], ...]
    commands: tuple[str, ...]


def view_run(report: Report) -> RunView:
    """Computes the content of the page of a report, or of a measurement alone."""
    bench = report.bench
    environment = bench.environment or report.environment
    beside = bench.arms if len(bench.arms) > 1 else {}
    reference = beside.get(bench.reference or "", MeasuredArm())
    peak = report.memory.compress_peak_rss_bytes
    return RunView(
        title=_title(report),
        recipe=_recipe(report),
        machine=_machine(environment),
        badges=_badges(report),
        tiles=_tiles(report),
        failures=report.failures,
        notes=_notes(report),
        size=view_size(report.size, reference.bundle),
        quality=view_quality(report.quality),
        source=view_source(report.source_check),
        parity=view_parity(report.parity),
        unverified=facts_of(report.parity.unverified) if report.parity else (),
        measurements=tuple(
            view
            for one in (bench, *report.grid)
            if (view := view_measurement(one, report.environment)) is not None
        ),
        compress_peak="" if peak is None else format_bytes(peak),
        stages=tuple(view_stage(stage) for stage in report.stages),
        environment=facts_of(environment.facts),
        provenance=_provenance(report),
        commands=_commands(report),
    )


def _first_arm(bench: Measurement) -> MeasuredArm:
    """The bundle that the report is about, on its first runtime."""
    return next(iter(bench.compared.values()), MeasuredArm())


def _title(report: Report) -> str:
    return report.model.name or _first_arm(report.bench).bundle.model or "unnamed model"


def _recipe(report: Report) -> str:
    if report.recipe is None:
        return ""
    return ": ".join(filter(None, (report.recipe.name, report.recipe.description)))


def _machine(environment: Environment) -> str:
    if not environment.processor:
        return ""
    count = environment.threads
    threads = f", {count} thread{'s' if count > 1 else ''}" if count else ""
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
    return (*badges, *view_verdicts(report.bench))


def _tiles(report: Report) -> tuple[Tile, ...]:
    arm, bench = _first_arm(report.bench), report.bench
    return (
        _size_tile(report.size, arm.bundle.stored_bytes),
        _quality_tile(report.quality),
        _latency_tile("First token, user", "ttft_user_ms", arm),
        _latency_tile("Decode", "decode_tok_s", arm),
        _memory_tile(arm, bench.arms.get(bench.reference or "") if arm.ratios else None),
    )


def _size_tile(size: Size, stored_bytes: int | None) -> Tile:
    bundle = stored_bytes if size.bundle_bytes is None else size.bundle_bytes
    source = size.source_bytes
    detail = "everything an app ships"
    if bundle and source:
        detail = f"{format_share(bundle / source)} of the source's {format_bytes(source)}"
    return _tile("Bundle on disk", None if bundle is None else format_bytes(bundle), detail)


def _latency_tile(label: str, name: str, arm: MeasuredArm) -> Tile:
    figure, ratio = arm.latency.figure(name), arm.ratios.get(name)
    beside = (
        f"; in pairs {spell_ratio(name, ratio)} the baseline"
        if ratio
        else ", no baseline in this run"
    )
    shown = None if figure.median is None else format_figure(name, figure.median)
    if name in arm.withheld:
        shown, beside = "implausible", "; it failed a plausibility check"
    return _tile(label, shown, f"median of {len(figure.samples)}{beside}")


def _memory_tile(arm: MeasuredArm, reference: MeasuredArm | None) -> Tile:
    peak = arm.memory.peak_rss_bytes
    detail = "resident, process with this bundle alone"
    if reference is not None and reference.memory.peak_rss_bytes:
        detail += f"; baseline {format_bytes(reference.memory.peak_rss_bytes)}"
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
    if report.bundle is not None and report.bundle.manifest_sha256 is not None:
        facts.append(("manifest sha256", report.bundle.manifest_sha256))
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
        baseline = " --baseline FLOAT_BUNDLE" if len(bench.arms) > 1 else ""
        commands.append(f"pocketvlm bench BUNDLE --workload {bench.workload.name}{baseline}")
    commands.append('pocketvlm ask BUNDLE --image photo.jpg --prompt "What is in the picture?"')
    return tuple(commands)
