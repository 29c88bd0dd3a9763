"""What a report's page shows, worked out of the report's blocks; drawing it is the template's.

Nothing is computed here that the report does not hold: a block that is missing becomes "not
measured", and every note of every block is collected in one place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketvlm.reports.charts import Bar
from pocketvlm.reports.formatting import (
    NOT_MEASURED,
    facts_of,
    format_bytes,
    format_figure,
    format_share,
    mapping_of,
    number_of,
    rows_of,
    text_of,
    texts_of,
)
from pocketvlm.reports.view_artifact import (
    Badge,
    ParityView,
    QualityView,
    SizeView,
    StageView,
    score_of,
    view_parity,
    view_quality,
    view_size,
    view_source,
    view_stage,
)
from pocketvlm.reports.view_measurement import (
    TargetLatency,
    describe_memory,
    describe_workload,
    roles_of,
    spell_ratio,
    view_arm,
    view_latency,
    view_memory,
    view_plausibility,
)

__all__ = ["RunView", "Tile", "view_run"]

Row = Mapping[str, Any]


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
    """Everything that the page shows of one report."""

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
    arms: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    memory_bars: tuple[Bar, ...]
    memory_caption: str
    plausibility: tuple[tuple[str, str, str, str, str, str], ...]
    stages: tuple[StageView, ...]
    environment: tuple[tuple[str, str], ...]
    provenance: tuple[tuple[str, str], ...]
    commands: tuple[str, ...]


def view_run(report: Row) -> RunView:
    """Works out what a page shows of a report, or of the document of a bench alone."""
    bench = mapping_of(report.get("bench")) or report
    memory = mapping_of(report.get("memory"))
    arms = mapping_of(bench.get("bundles"))
    parity, unverified = view_parity(mapping_of(report.get("parity")))
    return RunView(
        title=_title(report, arms),
        recipe=_recipe(report),
        machine=_machine(report, bench),
        badges=_badges(report, bench),
        tiles=_tiles(report, bench),
        failures=texts_of(report.get("failures")),
        notes=_notes(report, bench),
        size=view_size(mapping_of(report.get("size")), arms),
        quality=view_quality(mapping_of(report.get("quality"))),
        source=view_source(mapping_of(report.get("source_check"))),
        parity=parity,
        unverified=unverified,
        latency=view_latency(report, bench),
        latency_caption=describe_workload(bench),
        arms=tuple((role, view_arm(mapping_of(arms[role]))) for role in roles_of(arms)),
        memory_bars=view_memory(memory),
        memory_caption=describe_memory(memory),
        plausibility=view_plausibility(bench),
        stages=tuple(view_stage(row) for row in rows_of(report.get("stages"))),
        environment=facts_of(bench.get("environment") or report.get("environment")),
        provenance=_provenance(report),
        commands=_commands(report, bench),
    )


def _title(report: Row, arms: Row) -> str:
    model = mapping_of(report.get("model")).get("name")
    bundle = mapping_of(arms.get("candidate")).get("model")
    return str(model or bundle or "unnamed model")


def _recipe(report: Row) -> str:
    recipe = mapping_of(report.get("recipe"))
    pieces = [str(recipe[key]) for key in ("name", "description") if recipe.get(key)]
    return ": ".join(pieces)


def _machine(report: Row, bench: Row) -> str:
    environment = mapping_of(bench.get("environment") or report.get("environment"))
    if not environment.get("processor"):
        return ""
    threads = f", {environment['threads']} threads" if environment.get("threads") else ""
    return f"measured on {environment['processor']}{threads}"


def _badges(report: Row, bench: Row) -> tuple[Badge, ...]:
    badges = []
    source = view_source(mapping_of(report.get("source_check")))
    if source is not None:
        badges.append(Badge(text=f"source {source.badge.text}", tone=source.badge.tone))
    parity = mapping_of(report.get("parity"))
    if parity:
        passed = parity.get("passed") is True
        badges.append(
            Badge(text="parity passed", tone="good")
            if passed
            else Badge(text="parity FAILED", tone="bad")
        )
    else:
        badges.append(Badge(text=f"parity {NOT_MEASURED}", tone="plain"))
    failures = texts_of(report.get("failures"))
    if failures:
        badges.append(Badge(text=f"{len(failures)} checks or bounds failed", tone="bad"))
    stability = mapping_of(bench.get("stability"))
    if stability:
        stable = stability.get("is_stable") is True
        badges.append(
            Badge(text="quiet machine", tone="good")
            if stable
            else Badge(text="noisy run: speed is provisional", tone="warn")
        )
    checks = rows_of(bench.get("plausibility"))
    if checks:
        broken = sum(check.get("verdict") == "fail" for check in checks)
        badges.append(
            Badge(text=f"{broken} implausible figures", tone="bad")
            if broken
            else Badge(text="figures plausible", tone="good")
        )
    return tuple(badges)


def _tiles(report: Row, bench: Row) -> tuple[Tile, ...]:
    size, quality = mapping_of(report.get("size")), mapping_of(report.get("quality"))
    latency = _first(mapping_of(report.get("latency") or bench.get("latency")))
    memory = mapping_of(report.get("memory"))
    arms, ratios = mapping_of(bench.get("bundles")), mapping_of(bench.get("ratios"))
    bundle_bytes = number_of(size.get("bundle_bytes"))
    if bundle_bytes is None:
        bundle_bytes = number_of(mapping_of(arms.get("candidate")).get("stored_bytes"))
    source_bytes = number_of(size.get("source_bytes"))
    share = bundle_bytes / source_bytes if bundle_bytes and source_bytes else None
    tiles = [
        _tile(
            "Bundle on disk",
            format_bytes(bundle_bytes) if bundle_bytes is not None else None,
            f"{format_share(share)} of the source's {format_bytes(source_bytes)}"
            if share is not None
            else "everything an app ships",
        ),
        _quality_tile(quality),
    ]
    for name, label in (
        ("ttft_user_ms", "First token, user"),
        ("decode_tok_s", "Decode"),
    ):
        figure = mapping_of(latency.get(name))
        median, ratio = number_of(figure.get("median")), number_of(ratios.get(name))
        samples = figure.get("samples")
        n = len(samples) if isinstance(samples, list) else 0
        beside = (
            f"; in pairs {spell_ratio(name, ratio)} the baseline"
            if ratio
            else ", no baseline in this run"
        )
        tiles.append(
            _tile(
                label,
                None if median is None else format_figure(name, median),
                f"median of {n}{beside}",
            )
        )
    peak = number_of(memory.get("peak_rss_bytes"))
    beside_peak = number_of(mapping_of(memory.get("baseline")).get("peak_rss_bytes"))
    tiles.append(
        _tile(
            "Peak memory",
            None if peak is None else format_bytes(peak),
            "resident, process with this bundle alone"
            + (f"; baseline {format_bytes(beside_peak)}" if beside_peak else ""),
        )
    )
    return tuple(tiles)


def _tile(label: str, value: str | None, detail: str) -> Tile:
    if value is None:
        return Tile(label=label, value=NOT_MEASURED, unit="", detail="", is_measured=False)
    amount, _, unit = value.partition(" ")
    return Tile(label=label, value=amount, unit=unit, detail=detail, is_measured=True)


def _quality_tile(quality: Row) -> Tile:
    compressed, plain = score_of(quality.get("compressed")), score_of(quality.get("float"))
    accuracy = compressed[0]
    if accuracy is None:
        return _tile("Answers right", None, "")
    pieces = ["from the bundle"]
    if plain[0] is not None:
        pieces.append(f"float {format_share(plain[0])}")
    blind = number_of(quality.get("blind"))
    pieces.append(f"blind floor {format_share(blind)}" if blind is not None else "no blind floor")
    n = number_of(quality.get("n"))
    pieces.append(f"n = {n:,.0f}" if n is not None else "n unknown")
    return _tile("Answers right", format_share(accuracy), ", ".join(pieces))


def _notes(report: Row, bench: Row) -> tuple[str, ...]:
    """Every note of the report, of its stages and of the bench, each once."""
    notes = list(texts_of(report.get("notes")))
    for stage in rows_of(report.get("stages")):
        method = str(stage.get("method", "stage"))
        notes += [f"{method}: {note}" for note in texts_of(stage.get("notes"))]
        kept = Counter(
            str(layer["reason"])
            for layer in rows_of(stage.get("layers"))
            if layer.get("reason") and layer.get("bits") is None
        )
        notes += [
            f"{method}: {count} {'layer stays' if count == 1 else 'layers stay'} float: {why}"
            for why, count in kept.items()
        ]
    notes += texts_of(bench.get("notes"))
    return tuple(dict.fromkeys(notes))


def _provenance(report: Row) -> tuple[tuple[str, str], ...]:
    model, recipe = mapping_of(report.get("model")), mapping_of(report.get("recipe"))
    calibration = mapping_of(report.get("calibration"))
    facts = [*facts_of(model)]
    for target, needs in mapping_of(report.get("runtimes")).items():
        runtime, version = (
            text_of(mapping_of(needs).get(k)) for k in ("runtime", "lowest_version")
        )
        facts.append((f"{target} needs", f"{runtime} {version} or newer"))
    if recipe:
        facts.append(("recipe", f"{text_of(recipe.get('name'))}, {text_of(recipe.get('sha256'))}"))
    facts += [(f"calibration {name}", text) for name, text in facts_of(calibration)]
    return tuple(facts)


def _commands(report: Row, bench: Row) -> tuple[str, ...]:
    workload = mapping_of(bench.get("workload")).get("name")
    commands = [str(report["command"])] if report.get("command") else []
    if workload:
        baseline = " --baseline FLOAT_BUNDLE" if bench.get("baseline") else ""
        commands.append(f"pocketvlm bench BUNDLE --workload {workload}{baseline}")
    commands.append('pocketvlm ask BUNDLE --image photo.jpg --prompt "What is in the picture?"')
    return tuple(commands)


def _first(blocks: Row) -> Row:
    return mapping_of(next(iter(blocks.values()), None))
