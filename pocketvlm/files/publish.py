"""Publishing: a file or folder is written aside, and replaces the old one whole or not at all.

A reader sees either the old content or the new, at any moment: two folders are exchanged by one
system call. Everything is flushed first, so that a power cut leaves one of the two as well. Files
get the mode of the user's umask, which libraries that write to a private temporary file forget.

The temporary name is the final one with a unique suffix and `.partial`. It is locked while it is
being filled, so that the next attempt can tell what a dead process left from what a living one is
writing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pocketvlm.files.full_disk import naming_faults

__all__ = ["recover", "replace_directory", "replace_file", "take_place"]

if sys.platform != "win32":
    import fcntl

_AT_FDCWD = -100
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS
_RETIRED = ".retired.partial"


@contextmanager
def replace_file(path: Path, *, scratch: Path | None = None) -> Iterator[Path]:
    """Yields a path to write to, which replaces `path` only if the block succeeds.

    Args:
        path: The file.
        scratch: Folder on the same file system for the temporary file, where a kill may leave it;
            `None` for the file's own folder.

    Raises:
        StorageError: The disk is full.
    """
    aside = _aside(path if scratch is None else scratch / path.name)
    try:
        with naming_faults(path):
            aside.touch(exist_ok=False)
            mode = aside.stat().st_mode & 0o777
            yield aside
            aside.chmod(mode)
            _flush(aside)
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """Yields a folder to fill, which replaces `path` only if the block succeeds.

    A failure leaves the old folder; a kill leaves it too, next to a `.partial` folder that the next
    attempt removes. Several processes may write the same folder: each fills its own, and the last
    one wins.

    Raises:
        StorageError: The disk is full.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    with _locked_aside(path) as aside:
        try:
            with naming_faults(path.parent):
                yield aside
                _settle(aside)
                _put(aside, path)
        finally:
            _remove(aside)


def take_place(folder: Path, path: Path) -> None:
    """Replaces a folder with a finished one on the same disk, in one step.

    The old content, if any, is left where the finished folder was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _put(folder, path)


def recover(path: Path) -> None:
    """Restores a folder that a kill left without its name, and removes what dead processes left.

    Where the system cannot exchange, two renames publish a folder, and it is missing between them.
    """
    pattern = re.compile(re.escape(path.name) + r"(\.[0-9a-f]{8})?(\.retired)?\.partial")
    for left in sorted(path.parent.iterdir()) if path.parent.is_dir() else ():
        if not pattern.fullmatch(left.name) or left.is_symlink() or not left.is_dir():
            continue
        if not _is_abandoned(left):
            continue
        if left.name.endswith(_RETIRED) and not path.exists():
            with suppress(OSError):  # another process was faster
                left.rename(path)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


@contextmanager
def _locked_aside(path: Path) -> Iterator[Path]:
    """Makes a folder next to `path`, under a lock that ends with this process."""
    while True:
        aside = _aside(path)
        aside.mkdir()
        if sys.platform == "win32":
            yield aside
            return
        descriptor = os.open(aside, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if aside.is_dir():  # no other process took it for abandoned before it was locked
            break
        os.close(descriptor)
    try:
        yield aside
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _settle(folder: Path) -> None:
    """Gives everything in a folder its normal mode, and flushes it."""
    mode = folder.stat().st_mode & 0o777
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            file = Path(parent, name)
            if not file.is_symlink():
                file.chmod(mode & 0o666)
                _flush(file)
        Path(parent).chmod(mode)
        _flush(Path(parent))


def _put(aside: Path, path: Path) -> None:
    """Exchanges two folders, or renames one if the other does not exist."""
    try:
        _exchange(aside, path)
    except FileNotFoundError:
        aside.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        retired = aside.with_name(aside.name.removesuffix(".partial") + _RETIRED)
        path.rename(retired)
        aside.rename(path)
        shutil.rmtree(retired, ignore_errors=True)
    _flush(path.parent)


def _exchange(first: Path, second: Path) -> None:
    """Exchanges two names in one step.

    Raises:
        OSError: A name is missing (ENOENT), or the system or file system cannot do it (ENOSYS,
            EINVAL, ENOTSUP).
    """
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform == "linux":
        call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        arguments: tuple[int | bytes, ...] = (_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE)
    elif sys.platform == "darwin":
        call = getattr(ctypes.CDLL(None, use_errno=True), "renamex_np", None)
        arguments = (*names, _EXCHANGE)
    else:
        call, arguments = None, ()
    if call is None:
        number = errno.ENOSYS if second.exists() else errno.ENOENT
        raise OSError(number, os.strerror(number), str(second))
    if call(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(second))


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if sys.platform == "win32" and path.is_dir():
        return  # folders cannot be opened there, and need not be flushed
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # cannot be flushed, such as a network folder
            raise
    finally:
        os.close(descriptor)


def _is_abandoned(aside: Path) -> bool:
    """Whether no living process is writing it."""
    if sys.platform == "win32":
        return False  # a folder cannot be locked there: it stays until the user removes it
    try:
        descriptor = os.open(aside, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
