"""What a page shows of a measurement: latency, memory and whether the figures are plausible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocketvlm.reports.charts import Bar, Strip, Timeline, draw_bars, draw_strip, draw_timeline
from pocketvlm.reports.formatting import (
    format_bytes,
    format_figure,
    format_number,
    mapping_of,
    number_of,
    rows_of,
    text_of,
)

__all__ = [
    "StripView",
    "TargetLatency",
    "describe_memory",
    "describe_workload",
    "roles_of",
    "spell_ratio",
    "view_arm",
    "view_latency",
    "view_memory",
    "view_plausibility",
]

Row = Mapping[str, Any]

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
    ("expand_ms", "unpack weights, in load"),
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


def view_latency(report: Row, bench: Row) -> tuple[TargetLatency, ...]:
    """The latency blocks by target."""
    latency = mapping_of(report.get("latency") or bench.get("latency"))
    labels = {
        role: _label(role, mapping_of(arm))
        for role, arm in mapping_of(bench.get("bundles")).items()
    }
    baselines = mapping_of(bench.get("baseline"))
    order = [str(turn.get("role")) for turn in rows_of(bench.get("order"))]
    ratios = mapping_of(bench.get("ratios"))
    return tuple(
        _target(
            str(target), mapping_of(block), mapping_of(baselines.get(target)), order, ratios, labels
        )
        for target, block in latency.items()
    )


def _label(role: str, arm: Row) -> str:
    """A bundle's role and precision: a row without its precision says little."""
    precision = mapping_of(arm.get("precision")).get("decoder")
    return f"{role}, {precision}" if isinstance(precision, str) else role


def _target(
    target: str,
    candidate: Row,
    baseline: Row,
    order: Sequence[str],
    ratios: Row,
    labels: Mapping[str, str],
) -> TargetLatency:
    arms = [("candidate", candidate), ("baseline", baseline)]
    failed = [
        f"{role}: {block['failed']}" for role, block in arms if isinstance(block.get("failed"), str)
    ]
    strips = [
        view
        for name, title, detail in _CHARTS
        if (view := _strip(name, title, detail, arms, number_of(ratios.get(name)), labels))
        is not None
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
            _stage_row(name, label, candidate, baseline, ratios)
            for name, label in _STAGES
            # Bundles without packed weights have nothing to unpack.
            if name != "expand_ms" or name in candidate or name in baseline
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
    name: str,
    title: str,
    detail: str,
    arms: Sequence[tuple[str, Row]],
    ratio: float | None,
    labels: Mapping[str, str],
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
            (
                role,
                labels.get(role, role),
                format_figure(name, median),
                format_figure(name, p90),
                len(samples),
            )
            for role, samples, median, p90 in lanes
        ),
        ratio=f"{spell_ratio(name, ratio)} the baseline, pair by pair" if ratio else "",
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


def spell_ratio(name: str, ratio: float) -> str:
    """A ratio as a speed-up or a slow-down, so that above 1 is always said in words."""
    speedup = ratio if name.endswith("_tok_s") else 1 / ratio
    if speedup >= 1:
        return f"{speedup:.3g}× as fast as"
    return f"{1 / speedup:.3g}× slower than"


def describe_workload(bench: Row) -> str:
    """The workload in two sentences."""
    workload = mapping_of(bench.get("workload"))
    if not workload:
        return ""
    prompt = mapping_of(workload.get("prompt"))
    visual = f"({text_of(prompt.get('visual_tokens'))} visual tokens) + "
    picture = ""
    if workload.get("image_size"):
        picture = f"one {workload['image_size']}×{workload['image_size']} picture {visual}"
    elif workload.get("image_file"):
        picture = f"picture {workload['image_file']} {visual}"
    end = "end tokens ignored" if workload.get("ignore_eos") else "stops at the end token"
    return (
        f"Workload “{workload.get('name')}”: {picture}{workload.get('prompt_tokens')} text tokens, "
        f"{workload.get('new_tokens')} generated ({end}). Bundles take turns, each in "
        f"{workload.get('repeats')} fresh processes that answer {workload.get('warm_ups')} + "
        f"{workload.get('answers')} times: warm-up, then measured."
    )


def view_arm(arm: Row) -> tuple[tuple[str, str], ...]:
    """How one bundle of the comparison is stored."""
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


def roles_of(arms: Row) -> list[str]:
    """The bundles that were compared, the candidate first."""
    return [role for role in ("candidate", "baseline") if role in arms]


def view_memory(memory: Row) -> tuple[Bar, ...]:
    """Resident memory in steps, a bar for each bundle."""
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


def describe_memory(memory: Row) -> str:
    """What the memory bars count."""
    compress = number_of(memory.get("compress_peak_rss_bytes"))
    text = "Resident set of a process that runs one bundle alone; the worst of its repeats."
    if compress is not None:
        text += f" Making the bundle took {format_bytes(compress)} at its peak."
    return text


def view_plausibility(bench: Row) -> tuple[tuple[str, str, str, str, str, str], ...]:
    """The plausibility checks as rows of a table."""
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
