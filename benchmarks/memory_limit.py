"""A limit on the memory of a command, by a control group or a scope of systemd (Linux)."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["limited", "remove_group"]

_ROOT = Path("/sys/fs/cgroup")
_PREFIX = "pocketvlm-"
_PATIENCE_S = 10.0


@contextmanager
def limited(limit_bytes: int | None, root: Path = _ROOT) -> Iterator[list[str]]:
    """What to put before a command, so that it may not take more memory.

    Nothing is left behind: what still runs in the group is killed at the end, a terminated script
    ends as if it had been interrupted, and groups of scripts that were killed are removed by the
    next one.

    Args:
        limit_bytes: The limit; `None` for none.
        root: Where control groups are.
    """
    if limit_bytes is None:
        yield []
        return
    if shutil.which("systemd-run") and Path("/run/systemd/system").exists():
        scope = ["systemd-run", *(["--user"] if os.getuid() else []), "--scope", "--quiet"]
        yield [*scope, "-p", f"MemoryMax={limit_bytes}", "-p", "MemorySwapMax=0"]
        return
    is_first = (root / "memory").is_dir()  # version 1 of control groups
    parent = root / "memory" if is_first else root
    for left in parent.glob(f"{_PREFIX}*"):
        if not _is_running(left.name.removeprefix(_PREFIX)):
            remove_group(left)
    group = parent / f"{_PREFIX}{os.getpid()}"
    before = signal.signal(signal.SIGTERM, _interrupt)
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if is_first else "memory.max")).write_text(
            str(limit_bytes)
        )
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        remove_group(group)
        signal.signal(signal.SIGTERM, before)


def remove_group(group: Path) -> None:
    """Kills what runs in a control group, and removes it once that has ended.

    Raises:
        OSError: It has not ended after ten seconds.
    """
    end = time.monotonic() + _PATIENCE_S
    while True:
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            group.rmdir()
        except OSError:  # a process is dying
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return


def _is_running(pid: str) -> bool:
    return not pid.isdecimal() or Path(f"/proc/{pid}").exists()


def _interrupt(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
