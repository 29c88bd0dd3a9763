"""A lock on a run folder: two processes that write one folder would destroy each other's work.

The system holds the lock and drops it when the process ends, however it ends: a killed run leaves
nothing that has to be removed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pocketvlm.errors import RecipeError

__all__ = ["hold_lock", "refuse_if_held"]

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_LOCK = "lock"
_BEYOND = 2**20
"""The byte that Windows locks, beyond the owner's name: locked bytes cannot be read."""


@contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder that only one process may write.

    Args:
        folder: The run's working folder, which is made.

    Raises:
        RecipeError: Another process holds it; the message says which, and since when.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _take(descriptor):
                raise RecipeError(_describe_owner(folder))
            if _is_still_there(descriptor, folder / _LOCK):
                _write_owner(descriptor)
                yield
                return
            # A run that finished between opening and locking has removed it.
        finally:
            os.close(descriptor)


def refuse_if_held(folder: Path) -> None:
    """Checks before any work that no other process is writing a folder; takes no lock.

    Raises:
        RecipeError: As `hold_lock`.
    """
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:
        return
    try:
        if not _take(descriptor):
            raise RecipeError(_describe_owner(folder))
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    """Locks a file, on file systems that have locks; `False` if another process holds it."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _BEYOND, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return sys.platform != "win32"  # there a held lock is a plain permission error
    return True


def _is_still_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _write_owner(descriptor: int) -> None:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, json.dumps(owner).encode())


def _describe_owner(folder: Path) -> str:
    who = "another process"
    with suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
        owner = json.loads((folder / _LOCK).read_bytes())
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(owner["started"])))
        who = f"process {int(owner['pid'])} on {owner['host']}, since {since}"
    return (
        f"{folder.parent}: is being written by {who}; wait until it ends, or choose another --out"
    )
