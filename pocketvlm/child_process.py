"""Processes of this package: children end when their parent does, and all of them end quickly."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["end_process", "end_with_parent", "module_command", "start_child"]

_PARENT = "POCKETVLM_PARENT"
_THREAD = " thread"
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_POLL_S = 1.0


def module_command(module: str) -> list[str]:
    """The command that runs one of our modules with this Python.

    A child looks for modules in its working directory only if this process does: that folder may be
    untrusted.
    """
    looks_there = "" in sys.path
    with suppress(OSError):  # the folder may be gone
        looks_there = looks_there or str(Path.cwd()) in sys.path
    return [sys.executable, *([] if looks_there else ["-P"]), "-m", module]


@contextmanager
def start_child(
    command: Sequence[str], *, variables: Mapping[str, str] | None = None, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """Runs one of our programs; it is terminated at the end of the block if it is still running.

    Args:
        command: The program, which calls `end_with_parent` first.
        variables: Its environment variables; `None` for those of this process.
        options: Options of `subprocess.Popen`.
    """
    # Linux treats the end of the thread that started a child as the end of its parent.
    ties = threading.current_thread() is threading.main_thread()
    inherited = os.environ if variables is None else variables
    environment = {**inherited, _PARENT: f"{os.getpid()}{'' if ties else _THREAD}"}
    process = subprocess.Popen(  # noqa: S603  (our own program)
        command, text=True, encoding="utf-8", errors="replace", env=environment, **options
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                if options.get("start_new_session"):
                    os.killpg(process.pid, signal.SIGKILL)  # its own children go with it
                else:
                    process.kill()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        process.wait()


def end_with_parent() -> None:
    """Ends this process when the one that started it by `start_child` is gone."""
    said = os.environ.pop(_PARENT, "")
    parent = said.removesuffix(_THREAD)
    if not parent.isdecimal() or sys.platform == "win32":
        return
    pid = int(parent)
    if sys.platform == "linux" and parent == said:
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() == pid:
            return
    # The parent ended before this process was tied to it, another process stands between the two,
    # or a thread started it that may end earlier.
    threading.Thread(target=_wait_for_end, args=(pid,), daemon=True).start()


def end_process(code: int) -> NoReturn:
    """Ends this process; what is registered for its end runs, and no module is taken down.

    Python would free every object of every module first, which takes half a second where torch is
    imported, and gives back what the system takes back anyway. Processes of `multiprocessing` end
    in this way too.

    Args:
        code: The exit code.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001  (waits for its threads)
    atexit._run_exitfuncs()  # noqa: SLF001  (removes temporary files)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it, or it is closed
            if stream is not None:
                stream.flush()
    os._exit(code)


def _wait_for_end(pid: int) -> None:
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            os._exit(1)
        except OSError:
            return  # it cannot be asked
        if _is_dead(pid):
            os._exit(1)
        time.sleep(_POLL_S)


def _is_dead(pid: int) -> bool:
    """Whether a process is a zombie: it has ended and has not been waited for."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[:1] in (["Z"], ["X"])
