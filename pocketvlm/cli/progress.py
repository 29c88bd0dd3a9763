"""Progress bars, and an interrupt that no library swallows."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketvlm.context import Progress, ProgressCallback

__all__ = ["noticed_interrupts", "show_progress"]


@contextmanager
def show_progress() -> Iterator[ProgressCallback]:
    """A progress bar a task on stderr; plain silence where stderr is no terminal."""
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
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, Any] = {}

    def on_progress(step: Progress) -> None:
        raise_if_interrupted()
        if step.task not in tasks:
            tasks[step.task] = bars.add_task(step.task, total=step.total or None, note="")
        bars.update(tasks[step.task], completed=step.done, note=step.note)

    with bars, noticed_interrupts() as raise_if_interrupted:
        yield on_progress


@contextmanager
def noticed_interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C that hits a finalizer is printed and forgotten by Python; here the next step stops."""
    noticed: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        noticed.append(number)
        signal.default_int_handler(number, frame)

    def raise_if_interrupted() -> None:
        if noticed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield raise_if_interrupted
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield raise_if_interrupted
    finally:
        signal.signal(signal.SIGINT, before)
