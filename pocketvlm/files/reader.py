"""Reads untrusted files: only inside their folder, and only up to a bound.

An untrusted bundle, checkpoint or data set names files. These are read only inside its own folder,
and only if they are regular files: a link that leaves the folder, a pipe or a device is refused in
one line.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pocketvlm.errors import BundleError, PocketVLMError

__all__ = ["MAX_TEXT_BYTES", "file_sha256", "is_lfs_pointer", "locate", "read_bytes", "read_text"]

MAX_TEXT_BYTES = 2**28
"""The largest text file that is read; the largest published tokenizers have 35 MB."""

# Without O_NONBLOCK, opening a pipe without a writer would block forever; O_BINARY is for Windows.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_PIECE_BYTES = 2**18
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def locate(folder: Path, name: str, *, error: type[PocketVLMError] = BundleError) -> Path:
    """The path of a file that is named by a document in a folder.

    Links are followed inside the folder. In a hub's cache, where every file of a snapshot is a link
    to a blob, they are followed to the blobs of the same repository as well.

    Args:
        folder: The folder of the document.
        name: The file's name, relative, with forward slashes.
        error: What is raised when the file may not be read.

    Raises:
        PocketVLMError: `error`: the name is not a relative path inside the folder, the file is
            missing, or it is not a regular file.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise error(f"{folder}: {name!r} is not the name of a file inside this folder")
    path = folder.joinpath(*parts)
    try:
        real = path.resolve(strict=True)
        roots = _roots(folder.resolve(strict=True))
        mode = real.stat().st_mode
    except (OSError, RuntimeError, ValueError) as fault:  # a loop of links, a name too long
        raise error(f"{path}: is missing") from fault
    if not any(real.is_relative_to(root) for root in roots):
        raise error(f"{path}: leads out of its folder; only files inside {folder} are read")
    if not stat.S_ISREG(mode):
        raise error(f"{path}: is not a regular file")
    return path


def _roots(folder: Path) -> tuple[Path, ...]:
    """Where files of a folder may be: in it, and in the blobs next to a hub's snapshot."""
    for parent in folder.parents:
        if parent.name == "snapshots":
            # `blobs` itself is not resolved: were it a link, it could lead anywhere.
            return (folder, parent.parent / "blobs")
    return (folder,)


def read_bytes(
    path: Path, *, error: type[PocketVLMError] = BundleError, max_bytes: int = MAX_TEXT_BYTES
) -> bytes:
    """Content of a regular file of bounded size.

    Raises:
        PocketVLMError: `error`: it is missing, not a regular file, too large, or the pointer that
            git leaves in place of a large file.
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except FileNotFoundError as fault:
        raise error(f"{path}: is missing") from fault
    except (OSError, ValueError) as fault:
        raise error(f"{path}: cannot be opened: {_reason(fault)}") from fault
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{path}: is not a regular file")
    with os.fdopen(descriptor, "rb") as stream:
        try:
            content = _read_up_to(stream, max_bytes + 1)
        except OSError as fault:
            raise error(f"{path}: cannot be read: {_reason(fault)}") from fault
    if len(content) > max_bytes:
        raise error(f"{path}: has more than {max_bytes:,} bytes, which is the most that is read")
    if content.startswith(_LFS_POINTER):
        raise error(
            f"{path}: is a pointer of git-lfs, not the file itself; run `git lfs pull` in its clone"
        )
    return content


def read_text(
    path: Path, *, error: type[PocketVLMError] = BundleError, max_bytes: int = MAX_TEXT_BYTES
) -> str:
    """Text of a regular file, UTF-8 with or without a byte order mark, or UTF-16 with one.

    Line ends stay as they are.

    Raises:
        PocketVLMError: `error`, as in `read_bytes`, or if it is not text.
    """
    content = read_bytes(path, error=error, max_bytes=max_bytes)
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as fault:
        raise error(
            f"{path}: is not {encoding.upper().removesuffix('-SIG')} text: byte {fault.start}"
        ) from fault


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the pointer that git leaves in place of a large file."""
    with path.open("rb") as stream:
        return stream.read(len(_LFS_POINTER)) == _LFS_POINTER


def file_sha256(path: Path) -> str:
    """Hexadecimal digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_up_to(stream: BinaryIO, limit: int) -> bytes:
    """Reads up to `limit` bytes; one `read` of that many would allocate all of them."""
    pieces: list[bytes] = []
    while limit > 0 and (piece := stream.read(min(limit, _PIECE_BYTES))):
        pieces.append(piece)
        limit -= len(piece)
    return b"".join(pieces)


def _reason(fault: Exception) -> str:
    return getattr(fault, "strerror", None) or str(fault)
