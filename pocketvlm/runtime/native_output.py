"""Keeps what native libraries write off the terminal, where they write past Python."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

__all__ = ["quiet_terminal"]

Heard = Callable[[], AbstractContextManager[None]]


@contextmanager
def quiet_terminal() -> Iterator[Heard]:
    """Silences descriptors 1 and 2 inside the block.

    Yields:
        A context manager that restores the terminal, for a callback that writes to it.
    """
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)

    def silence() -> None:
        _flush()
        for descriptor in kept:
            os.dup2(nowhere, descriptor)

    def restore() -> None:
        _flush()
        for descriptor, original in kept.items():
            os.dup2(original, descriptor)

    @contextmanager
    def heard() -> Iterator[None]:
        restore()
        try:
            yield
        finally:
            silence()

    silence()
    try:
        yield heard
    finally:
        restore()
        for descriptor in (*kept.values(), nowhere):
            os.close(descriptor)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
