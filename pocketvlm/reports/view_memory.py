"""The page's content about memory: steps of every arm's process, and what counted its peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pocketvlm.reports.charts import Bar, draw_bars
from pocketvlm.reports.elements import Table, numbers, words
from pocketvlm.reports.formatting import format_bytes, text_of
from pocketvlm.reports.measurement import MeasuredArm, Memory

__all__ = ["MemoryView", "view_memory"]

_STEPS = ("empty process", "loaded bundle", "while answering", "peak")


@dataclass(frozen=True, kw_only=True)
class MemoryView:
    """Bars with their steps, and a table."""

    bars: tuple[Bar, ...]
    steps: tuple[str, ...]
    table: Table


def view_memory(arms: Mapping[str, MeasuredArm]) -> MemoryView | None:
    """Resident memory in steps, one bar per arm; `None` if no peak was measured."""
    measured = {
        name: arm.memory for name, arm in arms.items() if arm.memory.peak_rss_bytes is not None
    }
    if not measured:
        return None
    bars = [(name, _steps(memory)) for name, memory in measured.items()]
    return MemoryView(
        bars=draw_bars(bars),
        steps=tuple(step for step in _STEPS if any(step in parts for _, parts in bars)),
        table=Table(
            caption="Memory of a process that runs one bundle alone; the worst of its repeats",
            columns=(
                *words("Arm"),
                *numbers("Before load", "Loaded", "Prefill peak", "Decode peak"),
                *numbers("Peak", "PSS after"),
                *words("Peak counted by"),
            ),
            rows=tuple(_row(name, memory) for name, memory in measured.items()),
        ),
    )


def _steps(memory: Memory) -> Mapping[str, float]:
    before, after = memory.before_load_rss_bytes, memory.after_load_rss_bytes
    peak = memory.peak_rss_bytes or 0
    if before is None or after is None:
        return {"peak": peak}
    # The peak may occur while loading, and be above the resident set after it.
    return {
        "empty process": before,
        "loaded bundle": max(after - before, 0),
        "while answering": max(peak - max(after, before), 0),
    }


def _row(name: str, memory: Memory) -> tuple[str, ...]:
    amounts = (
        memory.before_load_rss_bytes,
        memory.after_load_rss_bytes,
        memory.peak_prefill_rss_bytes,
        memory.peak_decode_rss_bytes,
        memory.peak_rss_bytes,
        memory.after_pss_bytes,
    )
    shown = ("–" if amount is None else format_bytes(amount) for amount in amounts)
    return (name, *shown, text_of(memory.counter))
