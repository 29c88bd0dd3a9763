"""The page's content about many bundles: devices x bundles, and quality at its price."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pocketvlm.reports.elements import Table, numbers, words
from pocketvlm.reports.entries import Condition, Entry
from pocketvlm.reports.formatting import format_bytes, format_measured, format_share
from pocketvlm.reports.measurement import MeasuredArm
from pocketvlm.reports.planes import Plane, Point, draw_plane

__all__ = ["Overview", "PlaneView", "view_overview"]

_PARITY = {True: "pass", False: "FAIL", None: "–"}
_HOLLOW = "executorch"
"""The runtime whose dots are outlines; others are filled."""


@dataclass(frozen=True, kw_only=True)
class PlaneView:
    """Quality against one cost.

    Attributes:
        title: What the chart shows.
        axis: The cost and its unit.
        plane: The chart.
        front: Names of the bundles on the front, from the cheapest to the best.
        models: The index of a model is the shape and colour of its dots.
        hollow: The runtime whose dots are outlines; empty if there is none.
        absent: How many bundles lack the quality or the cost.
    """

    title: str
    axis: str
    plane: Plane
    front: tuple[str, ...]
    models: tuple[str, ...]
    hollow: str
    absent: int


@dataclass(frozen=True, kw_only=True)
class Overview:
    """Everything about more than one bundle.

    Attributes:
        title: How many bundles and devices.
        bundles: One row per bundle; with the timings if all are of one condition.
        matrix: One table per figure, bundles x devices, if there are several conditions.
        failures: What failed on which device, and why.
        planes: Quality against size, and against times on every device.
        missing: Titles of charts that nothing was measured for.
    """

    title: str
    bundles: Table
    matrix: tuple[Table, ...]
    failures: tuple[tuple[str, str], ...]
    planes: tuple[PlaneView, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Column:
    """A figure of the matrix."""

    title: str
    figure: str
    show: Callable[[float], str]
    value: Callable[[MeasuredArm], float | None]


def _first_token_ms(arm: MeasuredArm) -> float | None:
    return arm.latency.figure("ttft_user_ms").median


def _decode_tok_s(arm: MeasuredArm) -> float | None:
    return arm.latency.figure("decode_tok_s").median


def _peak_bytes(arm: MeasuredArm) -> float | None:
    return arm.memory.peak_rss_bytes


def _token_ms(arm: MeasuredArm) -> float | None:
    rate = _decode_tok_s(arm)
    return 1e3 / rate if rate else None


_COLUMNS = (
    _Column(
        title="First token, ms", figure="ttft_user_ms", show=format_measured, value=_first_token_ms
    ),
    _Column(
        title="Decode, tokens/s", figure="decode_tok_s", show=format_measured, value=_decode_tok_s
    ),
    _Column(title="Peak memory", figure="peak_rss_bytes", show=format_bytes, value=_peak_bytes),
)
_TIMES = (
    ("Quality against time to first token", "ms to the first token, as the user waits", 0),
    ("Quality against time per token", "ms per further token", 1),
)


def view_overview(entries: Sequence[Entry]) -> Overview | None:
    """Bundles side by side; `None` for less than two."""
    if len(entries) < 2:  # noqa: PLR2004  (one is not side by side)
        return None
    conditions = sorted({at for entry in entries for at in (*entry.arms, *entry.failed)})
    wanted: list[tuple[str, PlaneView | None]] = []
    title = "Quality against size"
    wanted.append((title, _view_plane(entries, title, "MB on disk", _megabytes)))
    for title, axis, cost in _TIMES:
        for condition in conditions:
            where = f"{title}, {condition.device}"
            view = _view_plane(entries, where, axis, _timing(condition, cost))
            wanted.append((where, view))
        if not conditions:
            wanted.append((title, None))
    return Overview(
        title=_title(entries, conditions),
        bundles=_bundles(entries, conditions[0] if len(conditions) == 1 else None),
        matrix=tuple(_matrix(entries, conditions, column) for column in _COLUMNS)
        if len(conditions) > 1
        else (),
        failures=tuple(
            (f"{number}. {entry.name}, {entry.runtime}, on {condition.device}", reason)
            for number, entry in enumerate(entries, 1)
            for condition, reason in entry.failed.items()
        ),
        planes=tuple(view for _, view in wanted if view is not None),
        missing=tuple(title for title, view in wanted if view is None),
    )


def _title(entries: Sequence[Entry], conditions: Sequence[Condition]) -> str:
    devices = len({condition.device for condition in conditions})
    models = len({entry.model for entry in entries})
    pieces = [f"{len(entries)} bundles", f"{models} model{'s' if models > 1 else ''}"]
    if devices:
        pieces.append(f"{devices} device{'s' if devices > 1 else ''}")
    return ", ".join(pieces)


def _bundles(entries: Sequence[Entry], condition: Condition | None) -> Table:
    timed = _COLUMNS if condition is not None else ()
    rows = []
    for number, entry in enumerate(entries, 1):
        size = "–" if entry.stored_bytes is None else format_bytes(entry.stored_bytes)
        cells = [_cell(entry, condition, column) for column in timed if condition is not None]
        rows.append(
            (
                f"{number}. {entry.name}",
                entry.runtime,
                size,
                *_score(entry),
                *cells,
                _PARITY[entry.has_parity],
            )
        )
    where = f"; timed on {condition.device}, {condition.workload}" if condition else ""
    return Table(
        caption=f"What an app ships, how well it answers, and what it takes{where}",
        columns=(
            *words("Bundle", "Runtime"),
            *numbers("On disk", "Answers right", "95 % interval"),
            *numbers(*(column.title for column in timed)),
            *words("Parity"),
        ),
        rows=tuple(rows),
    )


def _score(entry: Entry) -> tuple[str, str]:
    score = entry.score
    if score is None or score.accuracy is None:
        return "–", "–"
    low, high = score.interval_low, score.interval_high
    interval = "–" if low is None or high is None else f"{low * 100:.1f} to {high * 100:.1f} %"
    return format_share(score.accuracy), interval


def _matrix(entries: Sequence[Entry], conditions: Sequence[Condition], column: _Column) -> Table:
    return Table(
        caption=f"{column.title}, bundles and devices",
        columns=(
            *words("Bundle", "Runtime"),
            *numbers(*(f"{at.device}: {at.workload}" for at in conditions)),
        ),
        rows=tuple(
            (
                f"{number}. {entry.name}",
                entry.runtime,
                *(_cell(entry, condition, column) for condition in conditions),
            )
            for number, entry in enumerate(entries, 1)
        ),
    )


def _cell(entry: Entry, condition: Condition, column: _Column) -> str:
    """One figure; a failed arm stays in the table."""
    if condition in entry.failed:
        return "failed"
    arm = entry.arms.get(condition)
    value = None if arm is None else column.value(arm)
    if arm is None or value is None:
        return "–"
    return "implausible" if column.figure in arm.withheld else column.show(value)


def _megabytes(entry: Entry) -> float | None:
    return None if entry.stored_bytes is None else entry.stored_bytes / 1e6


def _timing(condition: Condition, which: int) -> Callable[[Entry], float | None]:
    """The cost of a bundle under a condition; implausible figures are not drawn."""
    figure, cost = (("ttft_user_ms", _first_token_ms), ("decode_tok_s", _token_ms))[which]

    def measure(entry: Entry) -> float | None:
        arm = entry.arms.get(condition)
        return None if arm is None or figure in arm.withheld else cost(arm)

    return measure


def _view_plane(
    entries: Sequence[Entry], title: str, axis: str, cost_of: Callable[[Entry], float | None]
) -> PlaneView | None:
    models = tuple(dict.fromkeys(entry.model for entry in entries))
    points = []
    for number, entry in enumerate(entries, 1):
        cost, score = cost_of(entry), entry.score
        if not cost or score is None or score.accuracy is None:
            continue
        words_of = f"{number}. {entry.name}, {entry.runtime}"
        points.append(
            Point(
                label=str(number),
                words=f"{words_of}: {format_share(score.accuracy)} at {format_measured(cost)}",
                cost=cost,
                quality=score.accuracy,
                low=score.interval_low,
                high=score.interval_high,
                group=models.index(entry.model),
                is_hollow=entry.runtime == _HOLLOW,
            )
        )
    if not points:
        return None
    plane = draw_plane(points)
    on_front = sorted((dot for dot in plane.dots if dot.is_on_front), key=lambda dot: dot.at)
    return PlaneView(
        title=title,
        axis=axis,
        plane=plane,
        front=tuple(dot.point.words for dot in on_front),
        models=models,
        hollow=_HOLLOW if any(point.is_hollow for point in points) else "",
        absent=len(entries) - len(points),
    )
