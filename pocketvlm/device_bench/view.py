"""What a report's page shows, worked out of the report's blocks; drawing it is the template's.

Nothing is computed here that the report does not hold: a block that is missing becomes "not
measured", and every note of every block is collected in one place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pocketvlm.device_bench.charts import (
    Bar,
    IntervalRow,
    Strip,
    Timeline,
    draw_bars,
    draw_interval,
    draw_strip,
    draw_timeline,
)
from pocketvlm.device_bench.wording import (
    NOT_MEASURED,
    format_bytes,
    format_figure,
    format_number,
    format_share,
    mapping_of,
    number_of,
    rows_of,
    text_of,
)

__all__ = ["RunView", "view_run"]

Tone = Literal["good", "bad", "warn", "plain"]
Row = Mapping[str, Any]

_PARTS = ("tower", "projector", "decoder", "embedding", "head")
_FIRST_TOKEN = ("preprocess_ms", "vision_ms", "tokenize_ms", "embed_ms", "prefill_ms")
_CHARTS = (
    ("ttft_user_ms", "Time to first token, as the user waits", "from picture file and text"),
    ("ttft_engine_ms", "Time to first token, engine alone", "from the embedded prompt"),
    ("vision_ms", "Vision encoder, token reduction included", "one graph"),
    ("prefill_ms", "Prefill", "visual and text tokens"),
    ("decode_tok_s", "Decode rate", "first to last token, sampling and text included"),
    ("load_ms", "Load", "fresh process, warm file cache"),
    ("cold_ttft_user_ms", "Time to first token, cold", "first answer of a fresh process"),
)
_STAGES = (
    ("load_ms", "load"),
    ("preprocess_ms", "preprocess"),
    ("vision_ms", "vision encode + token reduce"),
    ("tokenize_ms", "tokenise"),
    ("embed_ms", "embed prompt"),
    ("prefill_ms", "prefill"),
    ("decode_ms", "decode, a token"),
    ("sample_ms", "sample, a token"),
    ("detokenize_ms", "detokenise, a token"),
    ("cold_ttft_user_ms", "first token, user, cold"),
    ("ttft_user_ms", "first token, user"),
    ("ttft_engine_ms", "first token, engine"),
    ("prefill_tok_s", "prefill rate"),
    ("decode_tok_s", "decode rate"),
)
_LAYER_COLUMNS = ("name", "part", "bits", "group_size", "symmetric", "bits_per_weight")
_HIDDEN_COLUMNS = ("role", "block")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A headline figure."""

    label: str
    value: str
    detail: str
    is_measured: bool


@dataclass(frozen=True, kw_only=True)
class Badge:
    """A verdict in a word or two."""

    text: str
    tone: Tone


@dataclass(frozen=True, kw_only=True)
class StripView:
    """One figure with its raw samples."""

    name: str
    title: str
    detail: str
    unit: str
    strip: Strip
    lanes: tuple[tuple[str, str, str, str, int], ...]
    ratio: str


@dataclass(frozen=True, kw_only=True)
class TargetLatency:
    """The latency blocks of one target."""

    target: str
    failed: str
    strips: tuple[StripView, ...]
    first_token: tuple[Bar, ...]
    timeline: Timeline | None
    table: tuple[tuple[str, ...], ...]
    has_baseline: bool


@dataclass(frozen=True, kw_only=True)
class StageView:
    """One stage of the pipeline, with its layers."""

    method: str
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    columns: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class ParityView:
    """The certificate of one target."""

    target: str
    badge: Badge
    caption: str
    checks: tuple[tuple[str, str, str, bool], ...]
    details: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class RunView:
    """Everything that the page shows of one report."""

    title: str
    subtitle: str
    badges: tuple[Badge, ...]
    tiles: tuple[Tile, ...]
    failures: tuple[str, ...]
    notes: tuple[str, ...]
    size_bars: tuple[Bar, ...]
    size_rows: tuple[tuple[str, str, str, str], ...]
    size_caption: str
    quality_rows: tuple[IntervalRow, ...]
    quality_blind: float | None
    quality_caption: str
    quality_kinds: tuple[tuple[str, str, str, str, str], ...]
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
    size, memory = mapping_of(report.get("size")), mapping_of(report.get("memory"))
    quality = mapping_of(report.get("quality"))
    arms = mapping_of(bench.get("bundles"))
    bars, rows, caption = _size(size, arms)
    quality_rows, blind, quality_caption, kinds = _quality(quality)
    parity, unverified = _parity(mapping_of(report.get("parity")))
    return RunView(
        title=_title(report, arms),
        subtitle=_subtitle(report, bench),
        badges=_badges(report, bench),
        tiles=_tiles(report, bench),
        failures=_texts(report.get("failures")),
        notes=_notes(report, bench),
        size_bars=bars,
        size_rows=rows,
        size_caption=caption,
        quality_rows=quality_rows,
        quality_blind=blind,
        quality_caption=quality_caption,
        quality_kinds=kinds,
        parity=parity,
        unverified=unverified,
        latency=_latency(report, bench),
        latency_caption=_latency_caption(bench),
        arms=tuple((role, _arm(mapping_of(arms[role]))) for role in _roles(arms)),
        memory_bars=_memory(memory),
        memory_caption=_memory_caption(memory),
        plausibility=_plausibility(bench),
        stages=tuple(_stage(row) for row in rows_of(report.get("stages"))),
        environment=_facts(bench.get("environment") or report.get("environment")),
        provenance=_provenance(report),
        commands=_commands(report, bench),
    )


def _roles(arms: Row) -> list[str]:
    return [role for role in ("candidate", "baseline") if role in arms]


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def _title(report: Row, arms: Row) -> str:
    model = mapping_of(report.get("model")).get("name")
    bundle = mapping_of(arms.get("candidate")).get("model")
    return str(model or bundle or "unnamed model")


def _subtitle(report: Row, bench: Row) -> str:
    recipe = mapping_of(report.get("recipe"))
    environment = mapping_of(bench.get("environment") or report.get("environment"))
    pieces = [
        f"recipe {recipe['name']}" if recipe.get("name") else "",
        str(recipe.get("description") or ""),
        f"measured on {environment['processor']}" if environment.get("processor") else "",
        f"{environment['threads']} threads" if environment.get("threads") else "",
    ]
    return " · ".join(piece for piece in pieces if piece)


def _badges(report: Row, bench: Row) -> tuple[Badge, ...]:
    badges = []
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
    failures = _texts(report.get("failures"))
    if failures:
        badges.append(Badge(text=f"{len(failures)} checks or bounds failed", tone="bad"))
    stability = mapping_of(bench.get("stability"))
    if stability:
        stable = stability.get("is_stable") is True
        badges.append(
            Badge(text="quiet machine", tone="good")
            if stable
            else Badge(text="noisy run", tone="warn")
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
        ("ttft_user_ms", "First token, as the user waits"),
        ("decode_tok_s", "Decode"),
    ):
        figure = mapping_of(latency.get(name))
        median, ratio = number_of(figure.get("median")), number_of(ratios.get(name))
        samples = figure.get("samples")
        n = len(samples) if isinstance(samples, list) else 0
        beside = f", {_times(name, ratio)} the baseline" if ratio else ", no baseline in this run"
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
        return Tile(label=label, value=NOT_MEASURED, detail="", is_measured=False)
    return Tile(label=label, value=value, detail=detail, is_measured=True)


def _times(name: str, ratio: float) -> str:
    """A ratio as a speed-up or a slow-down, so that above 1 is always said in words."""
    speedup = ratio if name.endswith("_tok_s") else 1 / ratio
    if speedup >= 1:
        return f"{speedup:.3g}× as fast as"
    return f"{1 / speedup:.3g}× slower than"


def _quality_tile(quality: Row) -> Tile:
    compressed, plain = _score(quality.get("compressed")), _score(quality.get("float"))
    accuracy = compressed[0]
    if accuracy is None:
        return _tile("Answers right", None, "")
    pieces = [f"float {format_share(plain[0])}"] if plain[0] is not None else []
    blind = number_of(quality.get("blind"))
    pieces.append(f"blind floor {format_share(blind)}" if blind is not None else "no blind floor")
    n = number_of(quality.get("n"))
    pieces.append(f"n = {n:,.0f}" if n is not None else "n unknown")
    return _tile("Answers right, from the bundle", format_share(accuracy), ", ".join(pieces))


def _score(value: Any) -> tuple[float | None, float | None, float | None]:
    """Accuracy and interval of a score, whether it is a block or a bare number."""
    if isinstance(value, Mapping):
        names = ("accuracy", "interval_low", "interval_high")
        accuracy, low, high = (number_of(value.get(name)) for name in names)
        return accuracy, low, high
    return number_of(value), None, None


def _notes(report: Row, bench: Row) -> tuple[str, ...]:
    """Every note of the report, of its stages and of the bench, each once."""
    notes = list(_texts(report.get("notes")))
    for stage in rows_of(report.get("stages")):
        method = str(stage.get("method", "stage"))
        notes += [f"{method}: {note}" for note in _texts(stage.get("notes"))]
        kept = Counter(
            str(layer["reason"])
            for layer in rows_of(stage.get("layers"))
            if layer.get("reason") and layer.get("bits") is None
        )
        notes += [f"{method}: {count} layers stay float: {why}" for why, count in kept.items()]
    notes += _texts(bench.get("notes"))
    return tuple(dict.fromkeys(notes))


def _size(
    size: Row, arms: Row
) -> tuple[tuple[Bar, ...], tuple[tuple[str, str, str, str], ...], str]:
    bundle, source = number_of(size.get("bundle_bytes")), number_of(size.get("source_bytes"))
    if bundle is None:
        return (), (), ""
    after = _amounts(size.get("weight_bytes"))
    before = _amounts(size.get("source_weight_bytes"))
    if not after:
        after = _amounts(size.get("parts"))
    rest = bundle - sum(after.values())
    if rest > 0:
        after["rest"] = rest
    if not before and source is not None:
        before = {"all weights": source}
    rows = [("source", before)] if before else []
    rows.append(("bundle", after))
    baseline = number_of(mapping_of(arms.get("baseline")).get("stored_bytes"))
    caption = "Bytes on disk; “rest” is graphs, tokenizer and processor files."
    if baseline is not None:
        caption += f" The baseline bundle of the timings takes {format_bytes(baseline)}."
    table = [
        (
            part,
            format_bytes(before[part]) if part in before else "–",
            format_bytes(after[part]) if part in after else "–",
            format_share(after[part] / before[part]) if before.get(part) and part in after else "–",
        )
        for part in dict.fromkeys([*before, *after])
    ]
    table.append(
        (
            "total",
            "–" if source is None else format_bytes(source),
            format_bytes(bundle),
            format_share(bundle / source) if source else "–",
        )
    )
    return draw_bars(rows), tuple(table), caption


def _amounts(value: Any) -> dict[str, float]:
    amounts = {
        str(name): amount
        for name, item in mapping_of(value).items()
        if (amount := number_of(item)) is not None
    }
    ordered = [part for part in _PARTS if part in amounts]
    return {name: amounts[name] for name in [*ordered, *(n for n in amounts if n not in ordered)]}


def _quality(
    quality: Row,
) -> tuple[tuple[IntervalRow, ...], float | None, str, tuple[tuple[str, str, str, str, str], ...]]:
    rows = []
    for label, key, role in (
        ("float checkpoint", "float", "baseline"),
        ("bundle", "compressed", "candidate"),
    ):
        accuracy, low, high = _score(quality.get(key))
        if accuracy is not None:
            rows.append(draw_interval(label, role, accuracy, low, high))
    blind = number_of(quality.get("blind"))
    pieces = [str(quality["metric"])] if quality.get("metric") else []
    n, recovery = number_of(quality.get("n")), number_of(quality.get("recovery"))
    if n is not None:
        pieces.append(f"n = {n:,.0f}")
    if any(row.low is not None for row in rows):
        pieces.append("95 % Wilson intervals")
    if recovery is not None:
        pieces.append(f"recovery {format_share(recovery)} of float")
    pieces.append(
        f"blind floor {format_share(blind)}: what the same model answers when every picture is noise"
        if blind is not None
        else f"blind floor {NOT_MEASURED}"
    )
    before = mapping_of(mapping_of(quality.get("float")).get("per_kind"))
    after = mapping_of(mapping_of(quality.get("compressed")).get("per_kind"))
    kinds = tuple(
        (
            str(kind),
            text_of(mapping_of(after.get(kind) or before.get(kind)).get("n")),
            format_share(_score(before.get(kind))[0]),
            format_share(_score(after.get(kind))[0]),
            _interval(after.get(kind)),
        )
        for kind in sorted({*before, *after})
    )
    return tuple(rows), None if blind is None else blind * 100, "; ".join(pieces), kinds


def _interval(value: Any) -> str:
    _, low, high = _score(value)
    if low is None or high is None:
        return "–"
    return f"{low * 100:.1f} to {high * 100:.1f} %"


def _parity(parity: Row) -> tuple[tuple[ParityView, ...], tuple[tuple[str, str], ...]]:
    views = []
    for target, block in mapping_of(parity.get("targets")).items():
        row = mapping_of(block)
        passed = row.get("passed") is True
        views.append(
            ParityView(
                target=str(target),
                badge=Badge(
                    text="passed" if passed else "FAILED", tone="good" if passed else "bad"
                ),
                caption=f"{text_of(row.get('samples'))} questions, bounds for "
                f"{text_of(row.get('precision'))} arithmetic",
                checks=tuple(
                    (
                        str(check.get("metric")),
                        format_number(number_of(check.get("value")))
                        if check.get("value") is not None
                        else "not finite",
                        _bound(mapping_of(check.get("bound"))),
                        check.get("passed") is True,
                    )
                    for check in rows_of(row.get("checks"))
                ),
                details=_facts(row.get("details")),
            )
        )
    return tuple(views), _facts(parity.get("unverified"))


def _bound(bound: Row) -> str:
    ends = (("≥", number_of(bound.get("at_least"))), ("≤", number_of(bound.get("at_most"))))
    return " and ".join(f"{sign} {value:g}" for sign, value in ends if value is not None) or "–"


def _latency(report: Row, bench: Row) -> tuple[TargetLatency, ...]:
    latency = mapping_of(report.get("latency") or bench.get("latency"))
    baselines = mapping_of(bench.get("baseline"))
    order = [str(turn.get("role")) for turn in rows_of(bench.get("order"))]
    ratios = mapping_of(bench.get("ratios"))
    return tuple(
        _target(str(target), mapping_of(block), mapping_of(baselines.get(target)), order, ratios)
        for target, block in latency.items()
    )


def _target(
    target: str, candidate: Row, baseline: Row, order: Sequence[str], ratios: Row
) -> TargetLatency:
    arms = [("candidate", candidate), ("baseline", baseline)]
    failed = [
        f"{role}: {block['failed']}" for role, block in arms if isinstance(block.get("failed"), str)
    ]
    strips = [
        view
        for name, title, detail in _CHARTS
        if (view := _strip(name, title, detail, arms, number_of(ratios.get(name)))) is not None
    ]
    bars = [
        (
            role,
            {
                name.removesuffix("_ms"): value
                for name in _FIRST_TOKEN
                if (value := _median(block, name))
            },
        )
        for role, block in arms
    ]
    series = {role: _samples(block, "decode_tok_s") for role, block in arms}
    measured = {role: values for role, values in series.items() if values}
    return TargetLatency(
        target=target,
        failed="; ".join(failed),
        strips=tuple(strips),
        first_token=draw_bars([(role, parts) for role, parts in bars if parts]),
        timeline=_timeline(measured, order),
        table=tuple(
            _stage_row(name, label, candidate, baseline, ratios) for name, label in _STAGES
        ),
        has_baseline=bool(baseline),
    )


def _timeline(series: Mapping[str, list[float]], order: Sequence[str]) -> Timeline | None:
    """Drift over the run; only where one process gave one sample, else the order is not known."""
    if len(order) < 2 or any(len(values) != order.count(role) for role, values in series.items()):  # noqa: PLR2004  (a line has two ends)
        return None
    return draw_timeline(series, order, 96.0) if series else None


def _samples(block: Row, name: str) -> list[float]:
    samples = mapping_of(block.get(name)).get("samples")
    if not isinstance(samples, list):
        return []
    return [value for item in samples if (value := number_of(item)) is not None]


def _median(block: Row, name: str) -> float | None:
    return number_of(mapping_of(block.get(name)).get("median"))


def _p90(block: Row, name: str) -> float | None:
    return number_of(mapping_of(block.get(name)).get("p90"))


def _strip(
    name: str, title: str, detail: str, arms: Sequence[tuple[str, Row]], ratio: float | None
) -> StripView | None:
    lanes = []
    for role, block in arms:
        samples, median, p90 = _samples(block, name), _median(block, name), _p90(block, name)
        if samples and median is not None and p90 is not None:
            lanes.append((role, samples, median, p90))
    if not lanes:
        return None
    return StripView(
        name=name,
        title=title,
        detail=detail,
        unit=format_figure(name, 1.0).partition(" ")[2],
        strip=draw_strip(lanes),
        lanes=tuple(
            (role, role, format_figure(name, median), format_figure(name, p90), len(samples))
            for role, samples, median, p90 in lanes
        ),
        ratio=f"{_times(name, ratio)} the baseline, pair by pair" if ratio else "",
    )


def _stage_row(
    name: str, label: str, candidate: Row, baseline: Row, ratios: Row
) -> tuple[str, ...]:
    cells = [label, format_figure(name, 1.0).partition(" ")[2]]
    for block in (candidate, baseline):
        median, p90 = _median(block, name), _p90(block, name)
        cells += [
            "–" if median is None else format_number(median),
            "–" if p90 is None else format_number(p90),
        ]
    ratio = number_of(ratios.get(name))
    cells.append("–" if ratio is None else f"{ratio:.2f}")
    cells.append(str(len(_samples(candidate, name)) or "–"))
    return tuple(cells)


def _latency_caption(bench: Row) -> str:
    workload = mapping_of(bench.get("workload"))
    if not workload:
        return ""
    prompt = mapping_of(workload.get("prompt"))
    picture = (
        f"one {workload['image_size']}×{workload['image_size']} picture ({text_of(prompt.get('visual_tokens'))} visual tokens) + "
        if workload.get("image_size")
        else f"picture {workload['image_file']} + "
        if workload.get("image_file")
        else ""
    )
    end = "end tokens ignored" if workload.get("ignore_eos") else "stops at the end token"
    return (
        f"Workload “{workload.get('name')}”: {picture}{workload.get('prompt_tokens')} text tokens, "
        f"{workload.get('new_tokens')} generated ({end}). {workload.get('repeats')} fresh processes "
        f"a bundle, taking turns; each gives {workload.get('warm_ups')} warm-up and "
        f"{workload.get('answers')} measured answers."
    )


def _arm(arm: Row) -> tuple[tuple[str, str], ...]:
    precision = mapping_of(arm.get("precision"))
    return (
        *((str(part), text_of(label)) for part, label in precision.items()),
        ("KV cache", text_of(arm.get("kv_dtype"))),
        (
            "visual tokens",
            f"{text_of(arm.get('visual_tokens'))} of {text_of(arm.get('visual_tokens_full'))}",
        ),
        ("on disk", format_bytes(number_of(arm.get("stored_bytes")))),
    )


def _memory(memory: Row) -> tuple[Bar, ...]:
    rows = []
    for role, block in (("candidate", memory), ("baseline", mapping_of(memory.get("baseline")))):
        names = ("before_load_rss_bytes", "after_load_rss_bytes", "peak_rss_bytes")
        before, after, peak = (number_of(block.get(name)) for name in names)
        if peak is None:
            continue
        if before is None or after is None:
            rows.append((role, {"peak": peak}))
            continue
        # The peak may have been passed while loading, before the graphs had settled.
        rows.append(
            (
                role,
                {
                    "empty process": before,
                    "loaded bundle": max(after - before, 0.0),
                    "while answering": max(peak - max(after, before), 0.0),
                },
            )
        )
    return draw_bars(rows)


def _memory_caption(memory: Row) -> str:
    compress = number_of(memory.get("compress_peak_rss_bytes"))
    text = "Resident set of a process that runs one bundle alone; the worst of its repeats."
    if compress is not None:
        text += f" Making the bundle took {format_bytes(compress)} at its peak."
    return text


def _plausibility(bench: Row) -> tuple[tuple[str, str, str, str, str, str], ...]:
    return tuple(
        (
            str(check.get("role", "")),
            str(check.get("check")),
            "–" if check.get("value") is None else format_number(number_of(check.get("value"))),
            "–" if check.get("bound") is None else format_number(number_of(check.get("bound"))),
            str(check.get("verdict")),
            str(check.get("detail", "")),
        )
        for check in rows_of(bench.get("plausibility"))
    )


def _stage(stage: Row) -> StageView:
    layers = rows_of(stage.get("layers"))
    found = [key for layer in layers for key in layer]
    columns = [name for name in _LAYER_COLUMNS if name in found]
    columns += [
        name for name in dict.fromkeys(found) if name not in columns and name not in _HIDDEN_COLUMNS
    ]
    seconds = number_of(stage.get("seconds"))
    facts = [
        ("time", "–" if seconds is None else f"{seconds:.1f} s"),
        ("peak memory", format_bytes(number_of(stage.get("peak_rss_bytes")))),
        ("calibration", text_of(stage.get("calibration_sha256"))[:12]),
        *((f"{key}", text_of(value)) for key, value in mapping_of(stage.get("parameters")).items()),
        *((f"{key}", text_of(value)) for key, value in mapping_of(stage.get("metrics")).items()),
    ]
    return StageView(
        method=str(stage.get("method", "stage")),
        facts=tuple(facts),
        notes=_texts(stage.get("notes")),
        columns=tuple(columns),
        layers=tuple(
            tuple(
                format_bytes(number_of(layer.get(name)))
                if name.endswith("_bytes")
                else text_of(layer.get(name))
                for name in columns
            )
            for layer in layers
        ),
    )


def _facts(value: Any) -> tuple[tuple[str, str], ...]:
    facts: list[tuple[str, str]] = []
    for key, item in mapping_of(value).items():
        name = str(key)
        if name.endswith("_bytes_s") and number_of(item) is not None:
            facts.append((name.removesuffix("_bytes_s"), f"{format_bytes(number_of(item))}/s"))
        elif name.endswith("_bytes") and number_of(item) is not None:
            facts.append((name.removesuffix("_bytes"), format_bytes(number_of(item))))
        else:
            facts.append((name, text_of(item)))
    return tuple((name.replace("_", " "), text) for name, text in facts)


def _provenance(report: Row) -> tuple[tuple[str, str], ...]:
    model, recipe = mapping_of(report.get("model")), mapping_of(report.get("recipe"))
    calibration = mapping_of(report.get("calibration"))
    facts = [*_facts(model)]
    if recipe:
        facts.append(("recipe", f"{text_of(recipe.get('name'))}, {text_of(recipe.get('sha256'))}"))
    facts += [(f"calibration {name}", text) for name, text in _facts(calibration)]
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
