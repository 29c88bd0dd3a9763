"""A runner as a device gets it: one archive, and the command that starts it in its folder."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RunnerPackage", "python_runner", "write_archive"]

_DATA = (".py", ".yaml", ".j2", ".json")


@dataclass(frozen=True, kw_only=True)
class RunnerPackage:
    """A program that speaks the line protocol.

    Attributes:
        folder: The folder with everything that it needs.
        command: How it is started there: programs of the device by their name, its own by a path
            that begins with `./`.
        files: Which files of the folder are part of it; `None` for all of them.
    """

    folder: Path
    command: tuple[str, ...]
    files: tuple[Path, ...] | None = None


def python_runner() -> RunnerPackage:
    """This package, for a device that has Python and the packages that the runtime imports."""
    root = Path(__file__).parents[3]
    files = (root / "pocketvlm").rglob("*")
    return RunnerPackage(
        folder=root,
        command=("python3", "-m", "pocketvlm.device_bench.worker"),
        files=tuple(file for file in files if file.suffix in _DATA and file.is_file()),
    )


def write_archive(package: RunnerPackage, archive: Path) -> None:
    """Writes the same bytes for the same files, in the format that every `tar` reads."""
    files = package.files
    if files is None:
        files = tuple(file for file in package.folder.rglob("*") if file.is_file())

    def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o755 if entry.mode & 0o100 else 0o644
        return entry

    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
        for file in sorted(files):
            name = file.relative_to(package.folder)
            tar.add(file, f"./{name.as_posix()}", recursive=False, filter=anonymous)
