"""Memory of processes, from the counter that the system itself holds them to.

Linux and Android: `VmRSS`, `VmHWM` and PSS. Apple systems: `phys_footprint`, which counts
compressed pages too, and which the system ends processes by. Memory in use system-wide is never
looked at.
"""

from __future__ import annotations

import ctypes
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

__all__ = ["AppleMemory", "LinuxMemory", "MemoryCounter", "RusageInfo", "find_memory_counter"]

_PROC = Path("/proc")
_KIB = 1024
_FORGET_PEAK = "5"  # see proc(5), clear_refs
_RUSAGE_INFO_V4 = 4


class MemoryCounter(ABC):
    """Counts memory of some processes together.

    Attributes:
        name: What peaks are read from.
    """

    name: ClassVar[str]

    @abstractmethod
    def resident_bytes(self) -> int | None:
        """Memory in use now."""

    @abstractmethod
    def shared_out_bytes(self) -> int | None:
        """The proportional set size: pages that several processes map are shared out."""

    @abstractmethod
    def peak_bytes(self) -> int | None:
        """The peak since the processes started, or since it was last forgotten."""

    @abstractmethod
    def forget_peak(self) -> bool:
        """Begins a new peak; false where the system cannot do that."""


class LinuxMemory(MemoryCounter):
    """`/proc/PID/status` and `smaps_rollup`."""

    name = "VmHWM"

    def __init__(self, pids: Sequence[int], proc: Path = _PROC) -> None:
        """Names the processes.

        Args:
            pids: Their ids.
            proc: Where procfs is mounted.
        """
        self._folders = [proc / str(pid) for pid in pids]

    def resident_bytes(self) -> int | None:
        """`VmRSS` of all processes."""
        return self._sum("status", "VmRSS:")

    def shared_out_bytes(self) -> int | None:
        """`Pss` of all processes."""
        return self._sum("smaps_rollup", "Pss:")

    def peak_bytes(self) -> int | None:
        """`VmHWM` of all processes; an upper bound of their common peak where they are several."""
        return self._sum("status", "VmHWM:")

    def forget_peak(self) -> bool:
        """Sets `VmHWM` to what is resident now."""
        try:
            for folder in self._folders:
                (folder / "clear_refs").write_text(_FORGET_PEAK, encoding="ascii")
        except OSError:
            return False
        return True

    def _sum(self, file: str, key: str) -> int | None:
        total = 0
        for folder in self._folders:
            try:
                text = (folder / file).read_text(encoding="utf-8", errors="replace")
            except OSError:  # the process has ended, or its numbers are not ours to see
                return None
            lines = (line for line in text.splitlines() if line.startswith(key))
            line = next(lines, None)
            if line is None:
                return None
            total += int(line.split()[1]) * _KIB
        return total


class RusageInfo(ctypes.Structure):
    """`struct rusage_info_v4` of <sys/resource.h>."""

    _fields_ = (
        ("uuid", ctypes.c_uint8 * 16),
        ("before", ctypes.c_uint64 * 6),
        ("resident_size", ctypes.c_uint64),
        ("phys_footprint", ctypes.c_uint64),
        ("between", ctypes.c_uint64 * 20),
        ("lifetime_max_phys_footprint", ctypes.c_uint64),
        ("counters", ctypes.c_uint64 * 4),
        ("interval_max_phys_footprint", ctypes.c_uint64),
        ("runnable_time", ctypes.c_uint64),
    )


class AppleMemory(MemoryCounter):
    """`proc_pid_rusage` of libproc."""

    name = "phys_footprint"

    def __init__(
        self,
        pids: Sequence[int],
        read: Callable[[int, RusageInfo], int],
        reset: Callable[[int], int] | None,
    ) -> None:
        """Names the processes.

        Args:
            pids: Their ids.
            read: Fills in the usage of a process; returns 0 on success.
            reset: Begins a new interval of a process, likewise; `None` where there is no such call.
        """
        self._pids = tuple(pids)
        self._read, self._reset = read, reset
        self._peak_field = "lifetime_max_phys_footprint"

    @classmethod
    def of_system(cls, pids: Sequence[int]) -> AppleMemory | None:
        """The counter of this system; `None` if it is not one of Apple's."""
        try:
            library = ctypes.CDLL("/usr/lib/libproc.dylib")
        except OSError:
            return None

        def read(pid: int, info: RusageInfo) -> int:
            return int(library.proc_pid_rusage(pid, _RUSAGE_INFO_V4, ctypes.byref(info)))

        return cls(pids, read, getattr(library, "proc_reset_footprint_interval", None))

    def resident_bytes(self) -> int | None:
        """The footprint of all processes."""
        return self._sum("phys_footprint")

    def shared_out_bytes(self) -> int | None:
        """Not known there."""
        return None

    def peak_bytes(self) -> int | None:
        """The largest footprint; an upper bound of a common peak where processes are several."""
        return self._sum(self._peak_field)

    def forget_peak(self) -> bool:
        """Begins a new interval."""
        if self._reset is None or any(self._reset(pid) != 0 for pid in self._pids):
            return False
        self._peak_field = "interval_max_phys_footprint"
        return True

    def _sum(self, field: str) -> int | None:
        total = 0
        for pid in self._pids:
            info = RusageInfo()
            if self._read(pid, info) != 0:
                return None
            total += int(getattr(info, field))
        return total


def find_memory_counter(pids: Sequence[int]) -> MemoryCounter | None:
    """The counter of this system; `None` where none is known."""
    if sys.platform == "darwin":
        return AppleMemory.of_system(pids)
    with suppress(OSError):
        if (_PROC / "self" / "status").exists():
            return LinuxMemory(pids)
    return None
