"""The page's content about latency: every sample, first-token bars, drift and a table of stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pocketvlm.reports.charts import Bar, Strip, Timeline, draw_bars, draw_strip, draw_timeline
from pocketvlm.reports.formatting import format_figure, format_number
from pocketvlm.reports.measurement import Figure, Latency, MeasuredArm, Measurement

__all__ = ["StripView", "TargetLatency", "spell_ratio", "view_latency"]

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
    ("decode_ms", "decode, per token"),
    ("sample_ms", "sample, per token"),
    ("detokenize_ms", "detokenise, per token"),
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


def view_latency(bench: Measurement, latency: Mapping[str, Latency]) -> tuple[TargetLatency, ...]:
    """The latency blocks of every arm beside the reference; by target where there are no arms."""
    alone = bench.reference in bench.compared
    reference = None if alone else bench.arms.get(bench.reference or "")
    targets = {target: MeasuredArm(latency=figures) for target, figures in latency.items()}
    return tuple(
        _target(name, arm, reference, [str(process.arm) for process in bench.order], bench)
        for name, arm in (bench.compared or targets).items()
    )


def _label(name: str, arm: MeasuredArm) -> str:
    """An arm's name and precision, which every row shows."""
    precision = arm.bundle.precision.get("decoder")
    return name if precision is None else f"{name}, {precision}"


def _target(
    target: str,
    arm: MeasuredArm,
    reference: MeasuredArm | None,
    processes: Sequence[str],
    bench: Measurement,
) -> TargetLatency:
    ratios, roles = arm.ratios, {target: "candidate", bench.reference: "baseline"}
    figures = {"candidate": arm.latency, "baseline": (reference or MeasuredArm()).latency}
    labels = {"candidate": _label(target, arm)}
    if reference is not None and bench.reference is not None:
        labels["baseline"] = _label(bench.reference, reference)
    order = [roles[name] for name in processes if name in roles]
    strips = (
        _strip(name, title, detail, figures, ratios.get(name), labels)
        for name, title, detail in _CHARTS
    )
    bars = (
        (
            role,
            {
                name.removesuffix("_ms"): median
                for name in _FIRST_TOKEN
                if (median := of_role.figure(name).median)
            },
        )
        for role, of_role in figures.items()
    )
    samples = {role: of_role.figure("decode_tok_s").samples for role, of_role in figures.items()}
    return TargetLatency(
        target=target,
        failed="; ".join(
            f"{role}: {of_role.failed}"
            for role, of_role in figures.items()
            if of_role.failed is not None
        ),
        strips=tuple(strip for strip in strips if strip is not None),
        first_token=draw_bars([(role, parts) for role, parts in bars if parts]),
        timeline=_timeline({role: values for role, values in samples.items() if values}, order),
        table=tuple(_stage_row(name, label, figures, ratios.get(name)) for name, label in _STAGES),
        has_baseline=figures["baseline"] != Latency(),
    )


def _timeline(series: Mapping[str, Sequence[float]], order: Sequence[str]) -> Timeline | None:
    """Drift over the run; only if every process has one sample, else their order is unknown."""
    if len(order) < 2 or any(len(values) != order.count(role) for role, values in series.items()):  # noqa: PLR2004  (a line has two ends)
        return None
    return draw_timeline(series, order, 96.0) if series else None


def _strip(
    name: str,
    title: str,
    detail: str,
    figures: Mapping[str, Latency],
    ratio: float | None,
    labels: Mapping[str, str],
) -> StripView | None:
    lanes = [
        (role, figure.samples, figure.median, figure.p90)
        for role, figure in ((role, of_role.figure(name)) for role, of_role in figures.items())
        if figure.samples and figure.median is not None and figure.p90 is not None
    ]
    if not lanes:
        return None
    return StripView(
        name=name,
        title=title,
        detail=detail,
        unit=_unit(name),
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
    name: str, label: str, figures: Mapping[str, Latency], ratio: float | None
) -> tuple[str, ...]:
    ours, theirs = (figures[role].figure(name) for role in ("candidate", "baseline"))
    return (
        label,
        _unit(name),
        *_statistics(ours),
        *_statistics(theirs),
        "–" if ratio is None else f"{ratio:.2f}",
        str(len(ours.samples) or "–"),
    )


def _unit(name: str) -> str:
    return format_figure(name, 1.0).partition(" ")[2]


def _statistics(figure: Figure) -> tuple[str, str]:
    median, p90 = (
        "–" if value is None else format_number(value) for value in (figure.median, figure.p90)
    )
    return median, p90


def spell_ratio(name: str, ratio: float) -> str:
    """A ratio in words, as a speed-up or a slow-down."""
    speedup = ratio if name.endswith("_tok_s") else 1 / ratio
    if speedup >= 1:
        return f"{speedup:.3g}× as fast as"
    return f"{1 / speedup:.3g}× slower than"
