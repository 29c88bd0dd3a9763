"""A runner as a device gets it: a folder in one archive, and the command that starts it there."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

from pocketvlm.errors import InputError

__all__ = ["runner_command", "write_archive"]

_SCRIPT = "run"


def runner_command(folder: Path) -> tuple[str, ...]:
    """How a runner is started in its folder.

    Args:
        folder: What `pack-runner` wrote, or the folder of a native runner.

    Raises:
        InputError: It has neither a script `run` nor exactly one program.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of a runner")
    if (folder / _SCRIPT).is_file():
        return ("sh", _SCRIPT)
    programs = [
        file.name
        for file in folder.iterdir()
        if file.is_file() and os.access(file, os.X_OK) and ".so" not in file.suffixes
    ]
    if len(programs) != 1:
        raise InputError(
            f"{folder}: is not a runner's folder: it has neither a script {_SCRIPT!r} nor exactly "
            "one program"
        )
    return (f"./{programs[0]}",)


def write_archive(folder: Path, archive: Path) -> None:
    """Writes the same bytes for the same files, in the format that every `tar` reads."""

    def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o755 if entry.mode & 0o100 else 0o644
        return entry

    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            name = file.relative_to(folder)
            tar.add(file, f"./{name.as_posix()}", recursive=False, filter=anonymous)
