"""Runs programs of the environment under QEMU, as one of the processors that it knows."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pocketvlm.emulation.arm64.environment import Environment
from pocketvlm.environment import REPORTING
from pocketvlm.errors import UnsupportedError

__all__ = ["CPUS", "DEFAULT_CPU", "Emulator"]

CPUS: Mapping[str, str] = {
    "cortex-a72": "Armv8.0, no dot products: Raspberry Pi 4",
    "cortex-a55": "Armv8.2 with dot products: small cores of most phones since 2018",
    "cortex-a76": "Armv8.2 with dot products: large cores of 2019, Raspberry Pi 5",
    "cortex-a710": "Armv9.0 with int8 matrix products, bf16 and SVE2: large cores of 2022",
    "max": "everything that QEMU emulates, SME included",
}
"""Processors by QEMU's name: each stands for a set of kernels that runtimes choose from."""

DEFAULT_CPU = "cortex-a76"
_START = Path(__file__).with_name("start.py")
_PACKAGE = Path(__file__).parents[2]
# What the host's loader, Python and emulator are told is not for the emulated ones.
_NOT_INHERITED = re.compile(r"(LD_|PYTHON|QEMU_).*")


@dataclass(frozen=True, kw_only=True)
class Emulator:
    """An environment on one processor.

    Attributes:
        environment: The environment.
        cpu: One of `CPUS`.
    """

    environment: Environment
    cpu: str = DEFAULT_CPU

    def command(self, program: Path, *arguments: str) -> list[str]:
        """The command that runs an ARM64 program; libraries are those of the environment."""
        root = str(self.environment.root)
        return [
            str(self.environment.emulator),
            *("-cpu", self.cpu, "-L", root, str(program)),
            *arguments,
        ]

    def python_command(self, *arguments: str) -> list[str]:
        """The command that runs the environment's Python, which no variable steers."""
        cache = f"pycache_prefix={self.environment.bytecode}"
        return self.command(self.environment.python, "-I", "-X", cache, *arguments)

    def module_command(self, module: str) -> list[str]:
        """The command that runs one of this package's modules, to which arguments are appended."""
        package = str(_PACKAGE)
        return self.python_command(str(_START), str(self.environment.site), package, module)

    def variables(self) -> dict[str, str]:
        """The environment variables of an emulated process."""
        kept = {
            name: value for name, value in os.environ.items() if not _NOT_INHERITED.fullmatch(name)
        }
        return {**kept, **dict.fromkeys(REPORTING, "1")}

    def version(self) -> str:
        """QEMU's version.

        Raises:
            UnsupportedError: It does not say.
        """
        finished = subprocess.run(  # noqa: S603  (a program of the environment)
            [str(self.environment.emulator), "--version"],
            capture_output=True,
            text=True,
            check=False,
        )
        found = re.search(r"version (\d+(?:\.\d+)+)", finished.stdout)
        if found is None:
            raise UnsupportedError(f"{self.environment.emulator}: does not run")
        return found[1]
