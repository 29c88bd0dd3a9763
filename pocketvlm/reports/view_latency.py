"""The page's content about latency: every sample, first-token bars, drift, and tables of stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pocketvlm.reports.charts import Bar, Strip, draw_bars, draw_strip
from pocketvlm.reports.elements import Table, numbers, words
from pocketvlm.reports.formatting import format_bytes, format_figure, format_measured
from pocketvlm.reports.measurement import Figure, Latency, MeasuredArm, Measurement
from pocketvlm.reports.planes import Lines, draw_lines

__all__ = ["LatencyView", "Role", "StripView", "role_of", "spell_ratio", "view_latency"]

Role = str
"""`reference` or `arm`, by which the page colours."""

_FIRST_TOKEN = ("preprocess_ms", "vision_ms", "tokenize_ms", "embed_ms", "prefill_ms")
_CHARTS = (
    ("ttft_user_ms", "Time to first token, as the user waits", "from picture file and text"),
    ("decode_tok_s", "Decode rate", "first to last token, sampling and text included"),
    ("ttft_engine_ms", "Time to first token, engine alone", "from the embedded prompt"),
    ("vision_ms", "Vision encoder, token reduction included", "one graph"),
    ("prefill_ms", "Prefill", "visual and text tokens"),
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
_PREDICTED = {
    "vision_ms": "Vision",
    "prefill_ms": "Prefill",
    "ttft_user_ms": "First token, user",
    "decode_tok_s": "Decode rate",
    "ram_bytes": "Memory",
}
_GLANCE = ("ttft_user_ms", "ttft_engine_ms", "cold_ttft_user_ms", "prefill_tok_s", "decode_tok_s")


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One arm's line of a strip: its name and its statistics as text."""

    role: Role
    label: str
    median: str
    p90: str
    count: int


@dataclass(frozen=True, kw_only=True)
class StripView:
    """One figure with the raw samples of every arm."""

    title: str
    detail: str
    unit: str
    strip: Strip
    lanes: tuple[Lane, ...]


@dataclass(frozen=True, kw_only=True)
class LatencyView:
    """The latency of all arms of one measurement."""

    failed: tuple[tuple[str, str], ...]
    first_token: tuple[Bar, ...]
    stages: tuple[str, ...]
    glance: Table
    strips: tuple[StripView, ...]
    drift: Lines | None
    predicted: Table | None
    predictions: Table | None
    tables: tuple[Table, ...]


def role_of(bench: Measurement, name: str) -> Role:
    """Whether an arm is what others are compared with; a single arm is not."""
    return "reference" if name == bench.reference and len(bench.arms) > 1 else "arm"


def view_latency(bench: Measurement) -> LatencyView:
    """The latency blocks of a measurement."""
    arms = bench.arms
    bars = [(name, _first_token(arm)) for name, arm in arms.items()]
    strips = (_strip(bench, *chart) for chart in _CHARTS)
    return LatencyView(
        failed=tuple(
            (name, arm.latency.failed)
            for name, arm in arms.items()
            if arm.latency.failed is not None
        ),
        first_token=draw_bars([(name, parts) for name, parts in bars if parts]),
        stages=tuple(
            name.removesuffix("_ms")
            for name in _FIRST_TOKEN
            if any(name.removesuffix("_ms") in parts for _, parts in bars)
        ),
        glance=_glance(bench),
        strips=tuple(strip for strip in strips if strip is not None),
        drift=_drift(arms),
        predicted=_predicted(bench),
        predictions=_predictions(bench),
        tables=tuple(
            table
            for name, arm in arms.items()
            if arm.latency.figures
            for table in (
                _stages(name, arm.latency, arm.ratios),
                *(
                    _stages(f"{name}, turn {turn}", latency, {})
                    for turn, latency in enumerate(arm.later_turns, 2)
                ),
            )
        ),
    )


def _first_token(arm: MeasuredArm) -> Mapping[str, float]:
    """Medians of the stages before the first token, in their order."""
    return {
        name.removesuffix("_ms"): median
        for name in _FIRST_TOKEN
        if (median := arm.latency.figure(name).median)
    }


def _glance(bench: Measurement) -> Table:
    """One row per arm."""
    has_ratios = any(arm.ratios for arm in bench.arms.values())
    rows = []
    for name, arm in bench.arms.items():
        if arm.latency.failed is not None and not arm.latency.figures:
            cells = ["failed"] * len(_GLANCE)
        else:
            cells = [_median(arm, figure) for figure in _GLANCE]
        ratios = [_ratio(arm.ratios, figure) for figure in ("ttft_user_ms", "decode_tok_s")]
        rows.append((name, arm.runtime or "–", *cells, *(ratios if has_ratios else ())))
    return Table(
        caption="Every arm at a glance, medians; ratios are of pairs with the reference",
        columns=(
            *words("Arm", "Runtime"),
            *numbers(
                "First token, user, ms",
                "engine, ms",
                "cold, ms",
                "Prefill, tokens/s",
                "Decode, tokens/s",
            ),
            *(numbers("First token, ratio", "Decode, ratio") if has_ratios else ()),
        ),
        rows=tuple(rows),
    )


def _median(arm: MeasuredArm, name: str) -> str:
    if name in arm.withheld:
        return "implausible"
    median = arm.latency.figure(name).median
    return "–" if median is None else format_measured(median)


def _ratio(ratios: Mapping[str, float], name: str) -> str:
    ratio = ratios.get(name)
    return "–" if ratio is None else f"{ratio:.2f}"


def _stages(caption: str, latency: Latency, ratios: Mapping[str, float]) -> Table:
    """All figures of one turn of an arm."""
    return Table(
        caption=caption,
        columns=(
            *words("Stage", "Unit"),
            *numbers("p50", "p90", "p95", "p99", "Mean", "SD"),
            *(numbers("Ratio") if ratios else ()),
            *numbers("n"),
        ),
        rows=tuple(
            (
                label,
                _unit(figure),
                *_statistics(latency.figure(figure)),
                *((_ratio(ratios, figure),) if ratios else ()),
                str(len(latency.figure(figure).samples) or "–"),
            )
            for figure, label in _STAGES
        ),
    )


def _statistics(figure: Figure) -> tuple[str, ...]:
    values = (figure.median, figure.p90, figure.p95, figure.p99, figure.mean, figure.sd)
    return tuple("–" if value is None else format_measured(value) for value in values)


def _amount(name: str, value: float) -> str:
    return format_bytes(value) if name.endswith("_bytes") else format_measured(value)


def _predicted(bench: Measurement) -> Table | None:
    """Predicted by measured, one row per arm; `None` if nothing was predicted."""
    ratios = {
        name: {one.name: one.ratio for one in arm.predicted}
        for name, arm in bench.arms.items()
        if arm.predicted
    }
    if not ratios:
        return None
    shown = [name for name in _PREDICTED if any(name in found for found in ratios.values())]
    return Table(
        caption=f"Predicted by measured, 1 is exact: {bench.predicted_from or 'from counts alone'}",
        columns=(*words("Arm"), *numbers(*(_PREDICTED[name] for name in shown))),
        rows=tuple(
            (arm, *(_ratio(found, name) for name in shown)) for arm, found in ratios.items()
        ),
    )


def _predictions(bench: Measurement) -> Table | None:
    """Predictions beside medians; `None` if nothing was predicted."""
    rows = tuple(
        (
            name,
            one.name,
            _amount(one.name, one.predicted),
            _amount(one.name, one.measured),
            f"{one.ratio:.2f}",
        )
        for name, arm in bench.arms.items()
        for one in arm.predicted or ()
    )
    if not rows:
        return None
    return Table(
        caption="Every prediction beside the median that was measured",
        columns=(
            *words("Arm", "Figure"),
            *numbers("Predicted", "Measured", "Predicted by measured"),
        ),
        rows=rows,
    )


def _drift(arms: Mapping[str, MeasuredArm]) -> Lines | None:
    """Decode rate by repeat; a machine that slows down shows as lines that fall together."""
    series = {
        name: [
            (float(repeat), value)
            for repeat, value in enumerate(arm.latency.figure("decode_tok_s").by_repeat, 1)
            if value is not None
        ]
        for name, arm in arms.items()
    }
    shown = {name: points for name, points in series.items() if len(points) > 1}
    return draw_lines(shown) if shown else None


def _strip(bench: Measurement, name: str, title: str, detail: str) -> StripView | None:
    lanes = [
        (arm, figure.samples, figure.median, figure.p90)
        for arm, figure in ((arm, one.latency.figure(name)) for arm, one in bench.arms.items())
        if figure.samples and figure.median is not None and figure.p90 is not None
    ]
    if not lanes:
        return None
    return StripView(
        title=title,
        detail=detail,
        unit=_unit(name),
        strip=draw_strip(
            [(role_of(bench, arm), samples, median, p90) for arm, samples, median, p90 in lanes]
        ),
        lanes=tuple(
            Lane(
                role=role_of(bench, arm),
                label=arm,
                median=format_figure(name, median),
                p90=format_figure(name, p90),
                count=len(samples),
            )
            for arm, samples, median, p90 in lanes
        ),
    )


def _unit(name: str) -> str:
    return format_figure(name, 1.0).partition(" ")[2]


def spell_ratio(name: str, ratio: float) -> str:
    """A ratio in words, as a speed-up or a slow-down."""
    speedup = ratio if name.endswith("_tok_s") else 1 / ratio
    if speedup >= 1:
        return f"{speedup:.3g}× as fast as"
    return f"{1 / speedup:.3g}× slower than"
