"""The folder that holds an emulated ARM64 Python: what is in it, and where it is.

It holds QEMU's emulator, Debian's Python with the libraries that it loads, and the wheels that the
runtime of a bundle imports. Its name is a digest of what it is made from, so that another version
of this package builds another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pocketvlm.errors import MissingExtraError, UnsupportedError
from pocketvlm.json_io import read_json

__all__ = [
    "ARCHITECTURE",
    "EMULATOR_PACKAGE",
    "PREPARE",
    "PYTHON",
    "PYTHON_PACKAGES",
    "SUITE",
    "Environment",
    "environment_folder",
    "find_environment",
    "locked_wheels",
    "require_foreign_host",
]

ARCHITECTURE = "arm64"
SUITE = "trixie"
"""Debian's release. QEMU 7.2 of the one before crashes when ONNX Runtime 1.28 or newer loads."""

EMULATOR_PACKAGE = "qemu-user"
"""Debian's package of the emulator; its programs are linked statically."""

PYTHON = "python3.13"
PYTHON_PACKAGES = (
    "python3.13-minimal",
    "libpython3.13-minimal",
    "libpython3.13-stdlib",
    "libc6",
    "libgcc-s1",
    "libstdc++6",
    "libbz2-1.0",
    "libexpat1",
    "libffi8",
    "liblzma5",
    "libssl3t64",
    "libzstd1",
    "zlib1g",
)
"""What Python and the wheels load, as read from the maps of a process that answers."""

PREPARE = "pocketvlm verify --arch arm64 --prepare"
_LAYOUT = 1
_CONTENTS = "environment.json"


def locked_wheels() -> str:
    """Exact versions and digests of the wheels, as pip reads them."""
    return (files("pocketvlm.emulation.arm64") / "wheels.txt").read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """An environment, whether it is there or about to be made.

    Attributes:
        folder: Where it is.
    """

    folder: Path

    @property
    def emulator(self) -> Path:
        """QEMU's program."""
        return self.folder / "qemu-aarch64"

    @property
    def root(self) -> Path:
        """Debian's files."""
        return self.folder / "root"

    @property
    def python(self) -> Path:
        """The Python that is emulated."""
        return self.root / "usr" / "bin" / PYTHON

    @property
    def programs(self) -> tuple[Path, ...]:
        """What is run; an emulator, too, asks for the mode of programs."""
        return self.emulator, self.python

    @property
    def site(self) -> Path:
        """Packages from wheels."""
        return self.folder / "site"

    @property
    def bytecode(self) -> Path:
        """Where Python keeps what it compiled: compiling takes longer than importing."""
        return self.folder / "bytecode"

    @property
    def contents_file(self) -> Path:
        """What it holds, as `prepare` wrote it."""
        return self.folder / _CONTENTS

    @property
    def is_complete(self) -> bool:
        """Whether it can be used."""
        return self.contents_file.is_file() and all(
            os.access(program, os.X_OK) for program in self.programs
        )

    def contents(self) -> dict[str, Any]:
        """Versions and digests of everything that is in it."""
        return read_json(self.contents_file, error=UnsupportedError)


def environment_folder() -> Path:
    """Where the environment of this version is, in the user's cache."""
    made_of = [_LAYOUT, SUITE, EMULATOR_PACKAGE, PYTHON, *PYTHON_PACKAGES, locked_wheels()]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pocketvlm" / f"{ARCHITECTURE}-{digest[:16]}"


def require_foreign_host() -> None:
    """Refuses hosts that need no emulator, or have none.

    Raises:
        UnsupportedError: This host has the instruction set itself, or is not Linux.
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        raise UnsupportedError(
            "this host is ARM64 itself: `pocketvlm verify BUNDLE` without --arch runs on it"
        )
    if platform.system() != "Linux":
        raise UnsupportedError(
            f"--arch arm64 needs Linux, whose programs QEMU emulates; this is {platform.system()}"
        )


def find_environment() -> Environment:
    """The environment of this version.

    Raises:
        UnsupportedError: This host cannot have one.
        MissingExtraError: It has not been built.
    """
    require_foreign_host()
    environment = Environment(folder=environment_folder())
    if not environment.is_complete:
        raise MissingExtraError(
            f"there is no ARM64 environment in {environment.folder}; `{PREPARE}` builds it from "
            "Debian's packages and PyPI's wheels"
        )
    return environment
