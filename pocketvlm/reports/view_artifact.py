"""What a page shows of the artifact itself: size, quality, parity, and the stages that made it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pocketvlm.reports.charts import Bar, IntervalRow, draw_bars, draw_interval
from pocketvlm.reports.formatting import (
    NOT_MEASURED,
    facts_of,
    format_bytes,
    format_number,
    format_share,
    mapping_of,
    number_of,
    rows_of,
    text_of,
    texts_of,
)

__all__ = [
    "Badge",
    "ParityView",
    "QualityView",
    "SizeView",
    "StageView",
    "score_of",
    "view_parity",
    "view_quality",
    "view_size",
    "view_source",
    "view_stage",
]

Tone = Literal["good", "bad", "warn", "plain"]
Row = Mapping[str, Any]

_VERDICT_TONES: Mapping[str, Tone] = {"passed": "good", "failed": "bad"}

_PARTS = ("tower", "projector", "decoder", "embedding", "head")
# What a reader looks for first; whatever else a stage wrote down follows behind.
_LAYER_COLUMNS = (
    "name",
    "method",
    "grid",
    "sparsity",
    "bits",
    "bits_per_weight",
    "loss",
    "loss_rtn",
    "loss_magnitude",
    "damping",
    "dead_columns",
    "seconds",
    "reason",
)
_HIDDEN_COLUMNS = ("role", "block")


@dataclass(frozen=True, kw_only=True)
class Badge:
    """A verdict in a word or two."""

    text: str
    tone: Tone


@dataclass(frozen=True, kw_only=True)
class SizeView:
    """Bytes by part: bars, a table (part, source, bundle, share) and what they count."""

    bars: tuple[Bar, ...]
    rows: tuple[tuple[str, str, str, str], ...]
    caption: str


@dataclass(frozen=True, kw_only=True)
class QualityView:
    """Answers right, with intervals, the blind floor in per cent, and a table by kind."""

    rows: tuple[IntervalRow, ...]
    blind: float | None
    caption: str
    kinds: tuple[tuple[str, str, str, str, str], ...]


@dataclass(frozen=True, kw_only=True)
class ParityView:
    """The certificate of one target."""

    target: str
    badge: Badge
    caption: str
    checks: tuple[tuple[str, str, str, bool], ...]
    details: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class StageView:
    """One stage of the pipeline, with its layers."""

    method: str
    parameters: tuple[tuple[str, str], ...]
    outcome: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    columns: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]


def view_size(size: Row, arms: Row) -> SizeView | None:
    """The size block, or `None` where nothing was measured."""
    bundle, source = number_of(size.get("bundle_bytes")), number_of(size.get("source_bytes"))
    if bundle is None:
        return None
    after = _amounts(size.get("weight_bytes"))
    before = _amounts(size.get("source_weight_bytes"))
    if not after:
        after = _amounts(size.get("parts"))
    rest = bundle - sum(after.values())
    if rest > 0:
        after["rest"] = rest
    if not before and source is not None:
        before = {"all weights": source}
    unnamed = 0.0 if source is None else source - sum(before.values())
    if unnamed > 0:
        before["rest"] = unnamed
    rows = [("source", before)] if before else []
    rows.append(("bundle", after))
    baseline = number_of(mapping_of(arms.get("baseline")).get("stored_bytes"))
    caption = "Bytes on disk; “rest” is norms, biases, graphs, tokenizer and processor files."
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
    return SizeView(bars=draw_bars(rows), rows=tuple(table), caption=caption)


def _amounts(value: Any) -> dict[str, float]:
    amounts = {
        str(name): amount
        for name, item in mapping_of(value).items()
        if (amount := number_of(item)) is not None
    }
    ordered = [part for part in _PARTS if part in amounts]
    return {name: amounts[name] for name in [*ordered, *(n for n in amounts if n not in ordered)]}


def view_quality(quality: Row) -> QualityView | None:
    """The quality block, or `None` where nothing was measured."""
    rows = []
    for label, key, role in (
        ("float checkpoint", "float", "baseline"),
        ("bundle", "compressed", "candidate"),
    ):
        accuracy, low, high = score_of(quality.get(key))
        if accuracy is not None:
            rows.append(draw_interval(label, role, accuracy, low, high))
    if not rows:
        return None
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
        f"blind floor {format_share(blind)} (dashed): the same model when every picture is noise"
        if blind is not None
        else f"blind floor {NOT_MEASURED}"
    )
    before = mapping_of(mapping_of(quality.get("float")).get("per_kind"))
    after = mapping_of(mapping_of(quality.get("compressed")).get("per_kind"))
    kinds = tuple(
        (
            str(kind),
            text_of(mapping_of(after.get(kind) or before.get(kind)).get("n")),
            format_share(score_of(before.get(kind))[0]),
            format_share(score_of(after.get(kind))[0]),
            _interval(after.get(kind)),
        )
        for kind in sorted({*before, *after})
    )
    return QualityView(
        rows=tuple(rows),
        blind=None if blind is None else blind * 100,
        caption="; ".join(pieces),
        kinds=kinds,
    )


def score_of(value: Any) -> tuple[float | None, float | None, float | None]:
    """Accuracy and interval of a score, whether it is a block or a bare number."""
    if isinstance(value, Mapping):
        names = ("accuracy", "interval_low", "interval_high")
        accuracy, low, high = (number_of(value.get(name)) for name in names)
        return accuracy, low, high
    return number_of(value), None, None


def _interval(value: Any) -> str:
    _, low, high = score_of(value)
    if low is None or high is None:
        return "–"
    return f"{low * 100:.1f} to {high * 100:.1f} %"


def view_parity(parity: Row) -> tuple[tuple[ParityView, ...], tuple[tuple[str, str], ...]]:
    """The certificates by target, and the targets without one, with the reason."""
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
                    _check(check, text_of(check.get("metric")))
                    for check in rows_of(row.get("checks"))
                ),
                details=facts_of(row.get("details")),
            )
        )
    return tuple(views), facts_of(parity.get("unverified"))


def view_source(block: Row) -> ParityView | None:
    """What the source check found, or why it found nothing; `None` where a report has none."""
    if not block:
        return None
    verdict = text_of(block.get("verdict"))
    stock = mapping_of(block.get("stock"))
    differing = [
        (f"{check.get('sample')}, {check.get('metric')}", text_of(check.get("difference")))
        for check in rows_of(block.get("checks"))
        if check.get("difference")
    ]
    return ParityView(
        target="source",
        badge=Badge(
            text="FAILED" if verdict == "failed" else verdict,
            tone=_VERDICT_TONES.get(verdict, "plain"),
        ),
        caption=", ".join(f"{name} {value}" for name, value in stock.items())
        or text_of(block.get("reason")),
        checks=tuple(
            _check(check, f"{check.get('sample')}: {check.get('metric')}")
            for check in rows_of(block.get("checks"))
        ),
        details=tuple(differing),
    )


def _check(check: Row, name: str) -> tuple[str, str, str, bool]:
    value = check.get("value")
    return (
        name,
        "not finite" if value is None else format_number(number_of(value)),
        _bound(mapping_of(check.get("bound"))),
        check.get("passed") is True,
    )


def _bound(bound: Row) -> str:
    ends = (("≥", number_of(bound.get("at_least"))), ("≤", number_of(bound.get("at_most"))))
    return " and ".join(f"{sign} {value:g}" for sign, value in ends if value is not None) or "–"


def view_stage(stage: Row) -> StageView:
    """One stage record."""
    layers = rows_of(stage.get("layers"))
    found = [key for layer in layers for key in layer]
    columns = [name for name in _LAYER_COLUMNS if name in found]
    columns += [
        name for name in dict.fromkeys(found) if name not in columns and name not in _HIDDEN_COLUMNS
    ]
    seconds = number_of(stage.get("seconds"))
    outcome = [
        ("time", "–" if seconds is None else f"{seconds:.1f} s"),
        ("peak memory", format_bytes(number_of(stage.get("peak_rss_bytes")))),
        ("calibration", text_of(stage.get("calibration_sha256"))[:12]),
    ]
    parameters = mapping_of(stage.get("parameters"))
    return StageView(
        method=str(stage.get("method", "stage")),
        parameters=facts_of({key: parameters[key] for key in parameters if key != "method"}),
        outcome=(*outcome, *facts_of(stage.get("metrics"))),
        notes=texts_of(stage.get("notes")),
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
