"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pocketvlm.cli.interrupts import unwound_interrupts
from pocketvlm.printable import printable_line

if TYPE_CHECKING:
    from pocketvlm.context import Progress, ProgressCallback

__all__ = ["show_progress"]


@contextmanager
def show_progress() -> Iterator[ProgressCallback]:
    """Shows one progress bar per task on stderr, or nothing if stderr is not a terminal.

    Inside, an interrupt unwinds the command instead of ending it at once.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    bars = Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, Any] = {}

    def on_progress(step: Progress) -> None:
        raise_if_interrupted()
        if step.task not in tasks:
            tasks[step.task] = bars.add_task(
                printable_line(step.task), total=step.total or None, note=""
            )
        bars.update(tasks[step.task], completed=step.done, note=printable_line(step.note))

    with bars, unwound_interrupts() as raise_if_interrupted:
        yield on_progress
