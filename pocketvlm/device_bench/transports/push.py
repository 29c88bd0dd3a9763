"""Brings files to a device: resumable, and each compared by its sha256 there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketvlm.device_bench.transports.output import last_words
from pocketvlm.device_bench.transports.shell import LostConnectionError, Reply, Shell
from pocketvlm.errors import InputError

__all__ = ["PushFile", "Room", "push_files"]

_PIECE_BYTES = 2**18
_ATTEMPTS = 4
"""Tries of a file that is not as it was sent, and of a connection that brings nothing."""
_STALL_S = 60.0
_DIGEST_BYTES_S = 10e6
"""A device that reads its own files more slowly than this has vanished."""
# One line per file, its size and digest or two dashes; then free KiB of the disk and of the memory.
_EXAMINE = r"""
if command -v sha256sum >/dev/null 2>&1; then digest() { sha256sum; }
elif command -v shasum >/dev/null 2>&1; then digest() { shasum -a 256; }
else echo "it has neither sha256sum nor shasum" >&2; exit 69; fi
root=$1; place=$2; shift 2
df -Pk "$root" | tail -n 1 | sed -n 's/.* \([0-9][0-9]*\)  *[0-9][0-9]*% .*/free \1/p'
[ -r /proc/meminfo ] && sed -n 's/^MemAvailable: *\([0-9]*\) kB$/memory \1/p' /proc/meminfo
cd "$place" 2>/dev/null || { for f in "$@"; do echo "file - -"; done; exit 0; }
for f in "$@"; do
  if [ -f "./$f" ]; then
    sum=$(digest < "./$f"); size=$(wc -c < "./$f")
    echo "file" $size "${sum%% *}"
  else
    echo "file - -"
  fi
done
"""
_WRITE = r"""
umask 077
mkdir -p "$1" && cd "$1" && mkdir -p "./$2" || exit 69
if [ "$4" = 0 ]; then cat > "./$3"; else cat >> "./$3"; fi
"""


@dataclass(frozen=True, kw_only=True)
class PushFile:
    """A file to bring.

    Attributes:
        source: The file here.
        name: Its name in the folder there, with slashes.
        size_bytes: Its size.
        sha256: Its digest.
    """

    source: Path
    name: str
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, source: Path, name: str) -> PushFile:
        """The file as it is now."""
        size_bytes = source.stat().st_size
        return cls(
            source=source, name=name, size_bytes=size_bytes, sha256=_digest(source, size_bytes)
        )


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a device has left, in bytes; `None` where it does not say."""

    disk_bytes: int | None
    memory_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class _There:
    """A file as it is on the device."""

    size_bytes: int = 0
    sha256: str = ""


def push_files(
    shell: Shell,
    files: Sequence[PushFile],
    folder: str,
    *,
    root: str,
    name: str,
    require_room: Callable[[Room, int], None],
    reconnect: Callable[[], None],
) -> None:
    """Brings what is missing of some files, until all are there as they are here.

    A part of a file is continued if it is the beginning of the file, and replaced otherwise.

    Args:
        shell: Reaches the device.
        files: The files.
        folder: The folder there; it is made if need be.
        root: A folder there that exists, on the same disk.
        name: What the device is called in messages.
        require_room: Called with what the device has left and the bytes that are missing, before
            any is sent; raises `InputError` if that does not do.
        reconnect: Called after the connection was lost; raises `InputError` if that is for good.

    Raises:
        InputError: The device has no room, refuses a file, or vanished.
    """
    missing = [(file, 0) for file in files]
    least, idle, fault = float("inf"), 0, ""
    while missing:
        idle += 1
        if idle > _ATTEMPTS:
            raise InputError(f"{name}: {missing[0][0].name!r} was not brought, {fault}")
        try:
            room, found = _examine(shell, [file for file, _ in missing], folder, root, name)
            missing = [
                (file, there.size_bytes if _continues(file, there) else 0)
                for (file, _), there in zip(missing, found, strict=True)
                if there.sha256 != file.sha256
            ]
            left = sum(file.size_bytes - start for file, start in missing)
            if left < least:
                least, idle, fault = left, 0, f"it is not there as it was sent ({_ATTEMPTS} times)"
            require_room(room, left)
            for file, start in missing:
                _send(shell, file, folder, start, name)
        except LostConnectionError as lost:
            fault = f"the connection was lost: {lost}"
            reconnect()


def _continues(file: PushFile, there: _There) -> bool:
    """Whether what is there is the beginning of the file."""
    return 0 < there.size_bytes < file.size_bytes and there.sha256 == _digest(
        file.source, there.size_bytes
    )


def _examine(
    shell: Shell, files: Sequence[PushFile], folder: str, root: str, name: str
) -> tuple[Room, list[_There]]:
    total = sum(file.size_bytes for file in files)
    reply = shell.run(
        _EXAMINE,
        root,
        folder,
        *(file.name for file in files),
        timeout_s=_STALL_S + total / _DIGEST_BYTES_S,
    )
    _require_done(reply, name, "its files cannot be compared")
    rows = [line.split() for line in reply.out.decode("ascii", "replace").splitlines()]
    found = [
        _There() if row[1] == "-" else _There(size_bytes=int(row[1]), sha256=row[2])
        for row in rows
        if len(row) == 3 and row[0] == "file"  # noqa: PLR2004  (the word, the size and the digest)
    ]
    if len(found) < len(files):
        raise LostConnectionError("its answer is not complete")
    sizes = {row[0]: int(row[1]) * 1024 for row in rows if len(row) == 2}  # noqa: PLR2004
    room = Room(disk_bytes=sizes.get("free"), memory_bytes=sizes.get("memory"))
    return room, found[-len(files) :]


def _send(shell: Shell, file: PushFile, folder: str, start: int, name: str) -> None:
    reply = shell.run(
        _WRITE,
        folder,
        file.name.rpartition("/")[0],
        file.name,
        start,
        feed=_read_from(file.source, start),
        timeout_s=float("inf"),
        stall_s=_STALL_S,
    )
    _require_done(reply, name, f"{file.name!r} cannot be written")


def _require_done(reply: Reply, name: str, what: str) -> None:
    if reply.status != 0:
        raise InputError(f"{name}: {what}{last_words(reply.err)}")


def _digest(source: Path, size_bytes: int) -> str:
    """Digest of the first bytes of a file."""
    digest = hashlib.sha256()
    for piece in _read_from(source, 0):
        digest.update(piece[:size_bytes])
        size_bytes -= len(piece)
        if size_bytes <= 0:
            break
    return digest.hexdigest()


def _read_from(source: Path, start: int) -> Iterator[bytes]:
    with source.open("rb") as stream:
        stream.seek(start)
        while piece := stream.read(_PIECE_BYTES):
            yield piece
