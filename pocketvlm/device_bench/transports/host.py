"""This machine: the runner is a child process."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

from pocketvlm.bundle import Bundle
from pocketvlm.child_process import module_command, start_child
from pocketvlm.device_bench.protocol import Failure, Job, Result, parse_event, write_job
from pocketvlm.device_bench.transports.base import (
    Connection,
    EventCallback,
    Transport,
    ignore_event,
    read_output,
)

__all__ = ["HostConnection", "HostTransport"]

_RUNNER = tuple(module_command("pocketvlm.device_bench.worker"))


@dataclass(frozen=True, kw_only=True)
class HostTransport(Transport):
    """Runs the runner as a child process.

    Attributes:
        command: The runner's command line.
    """

    kind: ClassVar[str] = "host"
    command: tuple[str, ...] = _RUNNER

    def connect(self) -> HostConnection:
        """Connects; nothing can fail here."""
        return HostConnection(command=self.command)


@dataclass(frozen=True, kw_only=True)
class HostConnection(Connection):
    """Child processes of this one."""

    command: tuple[str, ...]

    def install(self, bundle: Bundle) -> str:
        """The bundle is here already."""
        return str(bundle.path.resolve())

    def run(
        self, job: Job, *, timeout_s: float, on_event: EventCallback = ignore_event
    ) -> Result | Failure:
        """Runs one job in a child process, which is killed with its children after the timeout."""
        return run_process(self.command, job, timeout_s=timeout_s, on_event=on_event)

    def close(self) -> None:
        """Nothing was put anywhere."""


def run_process(
    command: tuple[str, ...], job: Job, *, timeout_s: float, on_event: EventCallback
) -> Result | Failure:
    """Runs a command that speaks the protocol; it is killed with its children after the timeout.

    Args:
        command: The command line of a runner, or of a client that passes its output on.
        job: What it reads.
        timeout_s: Seconds until it is killed.
        on_event: Called for every event, as it arrives.
    """
    lines: list[str] = []
    err: list[str] = []
    with start_child(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a timeout or Ctrl-C also ends its children
    ) as process:
        assert process.stdin is not None  # noqa: S101  (pipes, above)
        assert process.stdout is not None  # noqa: S101
        assert process.stderr is not None  # noqa: S101
        stdin, stdout, stderr = process.stdin, process.stdout, process.stderr

        def write() -> None:
            with suppress(BrokenPipeError):  # its end says more than its closed input
                stdin.write(write_job(job))
                stdin.close()

        def read() -> None:
            for line in stdout:
                lines.append(line.rstrip("\n"))
                event = parse_event(lines[-1])
                if event is not None:
                    on_event(event)

        tasks = [
            threading.Thread(target=task, daemon=True)
            for task in (write, read, lambda: err.append(stderr.read()))
        ]
        for task in tasks:
            task.start()
        try:
            returncode: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            returncode = None
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for task in tasks:
            task.join()
    if returncode is None:
        events = tuple(event for event in map(parse_event, lines) if event is not None)
        return Failure(reason=f"no result within {timeout_s:g} s", events=events)
    return read_output(lines, "".join(err), returncode)
