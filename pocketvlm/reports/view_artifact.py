"""The page's content about a bundle: size, quality, source check and parity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pocketvlm.reports.charts import Bar, IntervalRow, draw_bars, draw_interval
from pocketvlm.reports.elements import Badge, Table, Tone, numbers, words
from pocketvlm.reports.formatting import (
    NOT_MEASURED,
    facts_of,
    format_bytes,
    format_number,
    format_share,
    text_of,
)
from pocketvlm.reports.measurement import MeasuredBundle
from pocketvlm.reports.report import (
    Bound,
    Check,
    Parity,
    Quality,
    Score,
    Size,
    SourceCheck,
)

__all__ = [
    "ParityView",
    "QualityView",
    "SizeView",
    "view_parity",
    "view_quality",
    "view_size",
    "view_source",
]

_VERDICT_TONES: Mapping[str, Tone] = {"passed": "good", "failed": "bad"}

_PARTS = ("tower", "projector", "decoder", "embedding", "head")


@dataclass(frozen=True, kw_only=True)
class SizeView:
    """Bytes by part: bars, their parts in order, a table, and what they count."""

    bars: tuple[Bar, ...]
    parts: tuple[str, ...]
    table: Table
    caption: str


@dataclass(frozen=True, kw_only=True)
class QualityView:
    """Answers right, with intervals, the blind floor in per cent, and a table by kind."""

    rows: tuple[IntervalRow, ...]
    blind: float | None
    caption: str
    kinds: Table | None


@dataclass(frozen=True, kw_only=True)
class ParityView:
    """The certificate of one target."""

    target: str
    badge: Badge
    caption: str
    checks: Table
    details: tuple[tuple[str, str], ...]


def view_size(size: Size, baseline: MeasuredBundle) -> SizeView | None:
    """The size block, or `None` if nothing was measured."""
    bundle, source = size.bundle_bytes, size.source_bytes
    if bundle is None:
        return None
    after = _by_part(size.weight_bytes or size.parts)
    before = _by_part(size.source_weight_bytes)
    rest = bundle - sum(after.values())
    if rest > 0:
        after["rest"] = rest
    if not before and source is not None:
        before = {"all weights": source}
    unnamed = 0 if source is None else source - sum(before.values())
    if unnamed > 0:
        before["rest"] = unnamed
    rows = [("source", before)] if before else []
    rows.append(("bundle", after))
    caption = "Bytes on disk; “rest” is norms, biases, graphs, tokenizer and processor files."
    if baseline.stored_bytes is not None:
        stored = format_bytes(baseline.stored_bytes)
        caption += f" The baseline bundle of the timings takes {stored}."
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
    return SizeView(
        bars=draw_bars(rows),
        parts=tuple(dict.fromkeys([*before, *after])),
        table=Table(
            caption="Size by part",
            columns=(*words("Part"), *numbers("Source", "Bundle", "Share")),
            rows=tuple(table),
        ),
        caption=caption,
    )


def _by_part(amounts: Mapping[str, int]) -> dict[str, int]:
    """The amounts in the order of the parts in the model."""
    ordered = [part for part in _PARTS if part in amounts]
    return {name: amounts[name] for name in dict.fromkeys([*ordered, *amounts])}


def view_quality(quality: Quality | None) -> QualityView | None:
    """The quality block, or `None` if nothing was measured."""
    if quality is None:
        return None
    rows = [
        draw_interval(label, role, score.accuracy, score.interval_low, score.interval_high)
        for label, score, role in (
            ("float checkpoint", quality.uncompressed, "reference"),
            ("bundle", quality.compressed, "arm"),
        )
        if score.accuracy is not None
    ]
    if not rows:
        return None
    pieces = [quality.metric] if quality.metric else []
    if quality.n is not None:
        pieces.append(f"n = {quality.n:,.0f}")
    if any(row.low is not None for row in rows):
        pieces.append("95 % Wilson intervals")
    if quality.recovery is not None:
        pieces.append(f"recovery {format_share(quality.recovery)} of float")
    pieces.append(
        f"blind floor {format_share(quality.blind)} (dashed): the same model when every picture "
        "is noise"
        if quality.blind is not None
        else f"blind floor {NOT_MEASURED}"
    )
    before, after = quality.uncompressed.per_kind, quality.compressed.per_kind
    return QualityView(
        rows=tuple(rows),
        blind=None if quality.blind is None else quality.blind * 100,
        caption="; ".join(pieces),
        kinds=_kinds(before, after) if before or after else None,
    )


def _kinds(before: Mapping[str, Score], after: Mapping[str, Score]) -> Table:
    return Table(
        caption="Answers right by kind of question",
        columns=(*words("Kind"), *numbers("n", "Float", "Bundle", "95 % interval")),
        rows=tuple(
            _kind(kind, before.get(kind), after.get(kind)) for kind in sorted({*before, *after})
        ),
    )


def _kind(kind: str, before: Score | None, after: Score | None) -> tuple[str, str, str, str, str]:
    ours, theirs = after or Score(), before or Score()
    low, high = ours.interval_low, ours.interval_high
    return (
        kind,
        text_of((after or theirs).n),
        format_share(theirs.accuracy),
        format_share(ours.accuracy),
        "–" if low is None or high is None else f"{low * 100:.1f} to {high * 100:.1f} %",
    )


def view_parity(parity: Parity | None) -> tuple[ParityView, ...]:
    """The certificates by target."""
    if parity is None:
        return ()
    return tuple(
        ParityView(
            target=target,
            badge=Badge(text="passed", tone="good")
            if certificate.passed
            else Badge(text="FAILED", tone="bad"),
            caption=f"{text_of(certificate.samples)} questions, bounds for "
            f"{text_of(certificate.precision)} arithmetic",
            checks=_checks(
                f"Certificate of {target}",
                [_check(check, text_of(check.metric)) for check in certificate.checks],
            ),
            details=facts_of(certificate.details),
        )
        for target, certificate in parity.targets.items()
    )


def view_source(source: SourceCheck | None) -> ParityView | None:
    """The outcome of the source check; `None` if a report has none."""
    if source is None:
        return None
    verdict = text_of(source.verdict)
    return ParityView(
        target="source",
        badge=Badge(
            text="FAILED" if verdict == "failed" else verdict,
            tone=_VERDICT_TONES.get(verdict, "plain"),
        ),
        caption=", ".join(f"{name} {value}" for name, value in source.stock.items())
        or text_of(source.reason),
        checks=_checks(
            "The checkpoint beside stock transformers",
            [_check(check, f"{check.sample}: {check.metric}") for check in source.checks],
        ),
        details=tuple(
            (f"{check.sample}, {check.metric}", check.difference)
            for check in source.checks
            if check.difference
        ),
    )


def _checks(caption: str, rows: Sequence[tuple[str, ...]]) -> Table:
    return Table(
        caption=caption,
        columns=(*words("Check"), *numbers("Measured", "Bound"), *words("Verdict")),
        rows=tuple(rows),
    )


def _check(check: Check, name: str) -> tuple[str, ...]:
    value = "not finite" if check.value is None else format_number(check.value)
    return name, value, _bound(check.bound), "pass" if check.passed else "FAIL"


def _bound(bound: Bound) -> str:
    ends = (("≥", bound.at_least), ("≤", bound.at_most))
    return " and ".join(f"{sign} {value:g}" for sign, value in ends if value is not None) or "–"
