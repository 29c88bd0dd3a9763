"""Tells a full disk from every other failure.

The system reports it as an `OSError`. Toolkits hide that: safetensors and protobuf keep only its
message, torch and coremltools not even that. So an exception is examined in three ways: by its
error number, by its message, and by asking whether the disk has room.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pocketvlm.errors import ExportError, PocketVLMError, StorageError

__all__ = ["describe_fault", "is_full", "naming_faults"]

_NUMBERS = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))  # no quota: Windows
_WORDS = re.compile(
    r"no space left on device|disk quota exceeded|file too large|not enough space on the disk"
    r"|\bos error (?:27|28|112|122)\b",
    re.IGNORECASE,
)
# torch's writer of archives says where it failed and not why; nothing but a write can fail there.
_WRITER = re.compile(r"PytorchStreamWriter failed|failed writing (?:file|central directory)")
_ROOM_BYTES = 2**16
"""A disk with less room than this counts as full: no weights fit into it."""


def describe_fault(error: BaseException, folder: Path | None = None) -> str | None:
    """Describes a full disk in a few words; `None` for any other error.

    Args:
        error: The exception; its causes and contexts are examined too.
        folder: Where something was being written: an error of a toolkit while that disk is full is
            attributed to the disk.
    """
    for link in _chain(error):
        if isinstance(link, StorageError):
            return str(link)
        if isinstance(link, OSError) and link.errno in _NUMBERS:
            where = f"{os.fsdecode(link.filename)}: " if link.filename else ""
            return f"{where}{link.strerror}"
        text = _text(link)
        words = _WORDS.search(text)
        if words is not None:
            return words.group()
        if _WRITER.search(text):
            return "a file could not be written whole"
    is_known = isinstance(error, PocketVLMError) and not isinstance(error, ExportError)
    return "No space left on device" if folder and not is_known and is_full(folder) else None


def is_full(folder: Path) -> bool:
    """Whether the disk of a folder has no room left, as far as the system says."""
    try:
        return shutil.disk_usage(folder).free < _ROOM_BYTES
    except OSError:
        return False


@contextmanager
def naming_faults(folder: Path) -> Iterator[None]:
    """Turns whatever the block raises because of a full disk into one line.

    Args:
        folder: What is being written.

    Raises:
        StorageError: The disk is full.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        fault = describe_fault(error, folder)
        if fault is None:
            raise
        where = "" if str(folder) in fault else f"{folder}: "
        raise StorageError(f"{where}{fault}; nothing that was there before is lost") from error


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001  (its own `__str__` is a library's code)
        return ""


def _chain(error: BaseException) -> list[BaseException]:
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    return links
