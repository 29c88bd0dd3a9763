"""Worker: runs inputs in a separate process and judges what each of them did."""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import shutil
import sys
import sysconfig
import time
import traceback
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import typer

from pocketvlm.child_process import module_command
from pocketvlm.cli.console import one_line
from pocketvlm.errors import PocketVLMError
from tests.fuzzing.entries import Case, Entry
from tests.fuzzing.materials import Materials

__all__ = ["MEMORY_BYTES", "SECONDS", "prepare", "run_input"]

SECONDS = 20
"""An input that takes longer hangs."""
MEMORY_BYTES = 2 * 2**30
"""An input that takes more than this over the start fills the memory."""
_REPOSITORY = Path(__file__).parents[2]

_noticed: list[str] = []
_NETWORK = (
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.sendto",
)
_PROCESSES = (
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pty.spawn",
)


def prepare(work: Path) -> None:
    """Watches this process from here on: memory, sockets, processes, files."""
    allowed = _allowed_roots(work)

    def notice(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _NETWORK or event == "socket.__new__":
            _noticed.append(f"socket: {event}")
        elif event == "subprocess.Popen":
            if not _is_own_worker(arguments[1]):
                _noticed.append(f"process: {arguments[1]!r}"[:200])
        elif event in _PROCESSES:
            _noticed.append(f"process: {event}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(allowed):
                _noticed.append(f"outside: {path}")

    sys.addaudithook(notice)
    gc.freeze()
    # Beyond any model here, and far below what would hurt the machine.
    virtual = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf(
        "SC_PAGE_SIZE"
    )
    resource.setrlimit(resource.RLIMIT_AS, (virtual + 8 * 2**30,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _allowed_roots(work: Path) -> tuple[str, ...]:
    python = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()}
    system = {
        "/proc/self",
        "/proc/cpuinfo",
        "/proc/meminfo",
        "/sys",
        "/dev/null",
        "/dev/urandom",
        "/usr/lib",
        "/usr/share",
        "/lib",
        "/etc/mime.types",
        "/etc/localtime",
        "/proc/stat",
        "/proc/sys",
    }
    roots = {*python, *system, str(_REPOSITORY), str(work), f"/proc/{os.getpid()}"}
    return tuple(sorted({os.path.realpath(root) for root in roots}))


def _is_own_worker(command: Any) -> bool:
    """Whether a command is the one process that runs what strangers made: ExecuTorch's."""
    return command == module_command("pocketvlm.runtime.executorch.worker")


def run_input(
    entry: Entry,
    index: int,
    seed: int,
    materials: Materials,
    work: Path,
    *,
    seconds: float = SECONDS,
    shows: bool = False,
) -> dict[str, Any]:
    """Builds and runs one input.

    Returns:
        `outcome` (accepted, refused, or a kind of failure), `detail`, `milliseconds`, `events`.
    """
    folder = work / f"{entry.name.replace(' ', '_')}-{index}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = random.Random(zlib.crc32(f"{seed} {entry.name} {index}".encode()))
    case = entry.build(rng, folder, materials)
    (folder / "arguments.json").write_text(json.dumps(case.arguments), encoding="utf-8")
    _reset_peak()
    before_bytes, before_files, start = _status("VmRSS"), _open_sockets(), time.monotonic()
    _noticed.clear()
    outcome, detail = _run(case, shows=shows)
    taken = time.monotonic() - start
    events = sorted(set(_noticed))
    if _open_sockets() - before_files:
        events.append("socket: left open")
    growth = _status("VmHWM") - before_bytes
    if outcome in ("accepted", "refused"):
        if taken > seconds:
            outcome, detail = "hang", f"{taken:.0f} s: {detail}"
        elif growth > MEMORY_BYTES:
            outcome, detail = "memory", f"{growth / 2**30:.1f} GiB: {detail}"
        elif problem := _partial_output(case, folder, failed=outcome != "accepted"):
            outcome, detail = "partial", problem
        elif outcome == "refused" and (problem := _unclear(case, detail)):
            outcome, detail = "unclear", f"{problem}: {detail}"
    gc.collect(1)
    if outcome in ("accepted", "refused") and not events:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "outcome": outcome,
        "detail": detail[:600],
        "milliseconds": round(1000 * taken),
        "events": events,
    }


def _run(case: Case, *, shows: bool) -> tuple[str, str]:
    from pocketvlm.cli.app import run_command

    try:
        try:
            run_command(list(case.arguments))
        except BaseException:
            if shows:
                traceback.print_exc()
            raise
    except PocketVLMError as error:
        return "refused", str(error)
    except (typer.TyperException, typer.Exit) as error:
        return "refused", "argument: " + str(error)
    except MemoryError as error:
        return "memory", _site(error)
    except OSError as error:
        if error.filename is not None:
            return "refused", f"{error.filename}: {error.strerror}"
        return "traceback", _site(error)
    except BaseException as error:  # noqa: BLE001  (that nothing else leaves is what is tested)
        return "traceback", _site(error)
    return "accepted", ""


def _site(error: BaseException) -> str:
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/pocketvlm/" in frame.filename
    ]
    place = f"{own[-1].filename.rpartition('/pocketvlm/')[2]}:{own[-1].lineno}" if own else "?"
    try:
        text = str(error)
    except Exception as fault:  # noqa: BLE001  (a library's own `__str__`)
        text = f"({type(fault).__name__} in its text)"
    return f"{type(error).__name__} at {place}: {text}"


def _partial_output(case: Case, folder: Path, *, failed: bool) -> str:
    if left := [path.name for path in folder.rglob("*.partial") if ".work" not in path.parts]:
        return f"left behind: {left[0]}"
    if case.out is None or not failed:
        return ""
    if case.bundle:
        return _broken_bundle(case.out / "bundle")
    return f"{case.out.name} is there after a failure" if case.out.exists() else ""


def _broken_bundle(bundle: Path) -> str:
    from pocketvlm.bundle import Bundle

    try:
        if bundle.exists():
            Bundle.open(bundle)
    except PocketVLMError as error:
        return f"bundle: {error}"
    return ""


def _unclear(case: Case, message: str) -> str:
    line = one_line(message)
    if any(unicodedata.category(sign) == "Cc" for sign in line):
        return "not printable"
    if not any(name in line for name in case.names):
        return "names no file"
    return ""


def _status(key: str) -> int:
    for line in (
        Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    ):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _open_sockets() -> int:
    count = 0
    for name in Path("/proc/self/fd").iterdir():
        try:
            count += str(name.readlink()).startswith("socket:")
        except OSError:
            continue
    return count
