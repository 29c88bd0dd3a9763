"""The machine that figures are measured on: processor, memory, versions, and raw samples.

Units are part of a field's name, raw samples are kept, and statistics are derived from them.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal

__all__ = [
    "REPORT_SCHEMA",
    "Samples",
    "available_memory_bytes",
    "describe_environment",
    "describe_processor",
    "package_version",
    "peak_rss_bytes",
    "process_peak_bytes",
    "return_free_memory",
    "toolchain_versions",
]

REPORT_SCHEMA = 2

_TOOLCHAIN = (
    "pocketvlm",
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "tokenizers",
    "numpy",
    "Pillow",
    "executorch",
    "coremltools",
)

# The name of the line of flags in /proc/cpuinfo on x86-64 and on ARM, and which flags count.
_FOR_KERNELS = {
    "flags": re.compile(r"avx\w*|amx_\w+|fma|f16c"),
    "Features": re.compile(r"asimd\w*|i8mm|bf16|fphp|sve\w*|sme\w*"),
}


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Raw samples of one quantity; the unit is in the name of the field that holds them."""

    values: tuple[float, ...] = field(default=())

    def quantile(self, q: float) -> float:
        """The q-quantile by linear interpolation between neighbouring samples."""
        ordered = sorted(self.values)
        position = q * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (ordered[above] - ordered[below]) * (position - below)

    def to_json(self) -> dict[str, Any]:
        """Samples, median and 90 % quantile; the last two are null for an empty list."""
        if not self.values:
            return {"samples": [], "median": None, "p90": None}
        return {
            "samples": list(self.values),
            "median": median(self.values),
            "p90": self.quantile(0.9),
        }


def describe_environment(threads: int) -> dict[str, Any]:
    """The machine and the versions that the figures of a report were measured on."""
    import psutil  # the runtime reads JSON through this module, and needs no psutil

    return {
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "threads": threads,
        "toolchain": toolchain_versions(),
    }


def describe_processor() -> dict[str, Any]:
    """What decides which kernels a runtime chooses: the architecture and its instruction sets."""
    return {"machine": platform.machine(), "instruction_sets": _instruction_sets()}


def package_version() -> str:
    """Version of pocketvlm, for stage records."""
    return metadata.version("pocketvlm")


def toolchain_versions(names: Sequence[str] = _TOOLCHAIN) -> dict[str, str | None]:
    """Installed versions by package name; `None` if not installed."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that this process may still take: what is free, or what its control groups leave.

    Args:
        root: Where `proc` and `sys` lie.
    """
    import psutil

    free = psutil.virtual_memory().available
    return max(0, min([free, *_left_in_groups(root)]))


def return_free_memory() -> None:
    """Gives memory back to the system that the C library keeps for later (glibc; else nothing).

    Between two layers that is several times what a layer needs, because matrices of many sizes
    leave holes of all sizes.
    """
    import ctypes

    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far, in bytes."""
    # On Linux a child inherits its parent's ru_maxrss through exec, so a small program started by a
    # large one would report the large one's peak; VmHWM belongs to this program alone.
    known = process_peak_bytes("self")
    if known is not None:
        return known
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, the others kibibytes.
    return peak if sys.platform == "darwin" else peak * 1024


def process_peak_bytes(pid: int | Literal["self"]) -> int | None:
    """The largest resident set of a process so far; `None` if the system does not say."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


# Limit, usage and statistics of a group, and what statistics call pages that can be dropped.
_GROUP_FILES = {
    "0": ("sys/fs/cgroup", "memory.max", "memory.current", ("active_file", "inactive_file")),
    "memory": (
        *("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("total_active_file", "total_inactive_file"),
    ),
}


def _left_in_groups(root: Path) -> list[int]:
    """What each control group above this process leaves, where it has a limit (Linux)."""
    left = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        files = _GROUP_FILES.get("memory" if "memory" in controllers.split(",") else number)
        if files is None:
            continue
        mount, limit, usage, droppable = files
        # In a container the path may be that of the host, where nothing is mounted here.
        for group in {*Path(path.lstrip("/")).parents, Path(path.lstrip("/"))}:
            folder = root / mount / group
            most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
            if not (most.isdigit() and used.isdigit()):
                continue
            rows = (row.split() for row in _read(folder / "memory.stat").splitlines())
            dropped = sum(int(row[1]) for row in rows if row[0] in droppable)
            left.append(int(most) - int(used) + dropped)
    return left


def _read(path: Path) -> str:
    """A file of the system; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _instruction_sets() -> list[str]:
    """Instruction sets that numeric kernels are written for; numpy's list except on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            name, _, flags = line.partition(":")
            counted = _FOR_KERNELS.get(name.strip())
            if counted:
                return sorted(flag for flag in flags.split() if counted.fullmatch(flag))
    import numpy as np

    found = np.show_config(mode="dicts") or {}
    return sorted(found.get("SIMD Extensions", {}).get("found", []))


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
