"""Signals that ask a command to end: one line, exit code 128 and the signal's number, no traceback.

A command may be ended at any point without harm, so while it imports its libraries it is ended at
once: an exception there could end up anywhere. During the work, the first signal unwinds it, which
removes its temporary files and ends its child processes; the second one ends it at once.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager, suppress

__all__ = ["announce", "install", "is_interrupted", "unwound_interrupts"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType
    from typing import NoReturn

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
_NUMBERS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_RESUMABLE = ("compress", "demo")
_received: list[int] = []
_announced: list[bool] = []


def install() -> None:
    """From here on, a signal ends the process at once, with one line.

    A signal that is ignored, as by `nohup`, stays so; except SIGINT, which shells ignore for
    background jobs, where it may be sent nevertheless.
    """
    with suppress(ValueError):  # not in the main thread
        for number in _heeded():
            signal.signal(number, _end)


def is_interrupted() -> bool:
    """Whether a signal has asked this process to end."""
    return bool(_received)


def announce() -> int:
    """Prints once that the command was interrupted; returns the exit code."""
    if not _announced:
        _announced.append(True)
        with suppress(OSError, ValueError):  # the terminal is gone, or stderr is closed
            print(_line(), file=sys.stderr, flush=True)
    return _exit_code()


@contextmanager
def unwound_interrupts() -> Iterator[Callable[[], None]]:
    """Inside, the first signal is a `KeyboardInterrupt`.

    Yields:
        A function that raises it again: Python prints and forgets one that hits a finalizer, and
        libraries may swallow it.
    """
    try:
        before = {number: signal.signal(number, _unwind) for number in _heeded()}
    except ValueError:  # not in the main thread
        yield lambda: None
        return
    hook = sys.unraisablehook
    sys.unraisablehook = _forget_interrupts
    try:
        yield _raise_if_interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


def _heeded() -> list[int]:
    return [
        number
        for number in _NUMBERS
        if number == signal.SIGINT or signal.getsignal(number) not in {signal.SIG_IGN, None}
    ]


def _line() -> str:
    goes_on = sys.argv[1:2] and sys.argv[1] in _RESUMABLE
    return "interrupted" + ("; the same command resumes where this one stopped" if goes_on else "")


def _exit_code() -> int:
    return 128 + (_received[0] if _received else signal.SIGINT)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    _received.append(number)
    if not _announced:
        with suppress(OSError):
            os.write(2, (_line() + "\n").encode())  # the interrupt may have hit `print`
    os._exit(_exit_code())


def _unwind(number: int, frame: FrameType | None) -> None:
    if _received:
        _end(number, frame)
    _received.append(number)
    raise KeyboardInterrupt


def _raise_if_interrupted() -> None:
    if _received:
        raise KeyboardInterrupt


def _forget_interrupts(unraisable: sys.UnraisableHookArgs) -> None:
    """Notes that a finalizer swallowed the interrupt; the next step raises it again."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
