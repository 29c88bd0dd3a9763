"""This machine: the runner is a child process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from pocketvlm.bundle import Bundle
from pocketvlm.child_process import module_command
from pocketvlm.device_bench.protocol import Failure, Job, Result, write_job
from pocketvlm.device_bench.transports.base import (
    Connection,
    EventCallback,
    Transport,
    ignore_event,
)
from pocketvlm.device_bench.transports.output import RunnerOutput
from pocketvlm.device_bench.transports.process import converse
from pocketvlm.device_bench.transports.runner_package import runner_command
from pocketvlm.errors import InputError

__all__ = ["HostConnection", "HostTransport"]

_RUNNER = tuple(module_command("pocketvlm.device_bench.runner.worker"))


@dataclass(frozen=True, kw_only=True)
class HostTransport(Transport):
    """Runs the runner as a child process.

    Attributes:
        command: The runner's command line.
    """

    kind: ClassVar[str] = "host"
    command: tuple[str, ...] = _RUNNER

    @classmethod
    def parse(cls, address: str, runner: Path | None = None) -> Self:
        """There is one host, and its address is empty.

        Args:
            address: Nothing.
            runner: A runner's folder; `None` for this package.

        Raises:
            InputError: There is an address, or the folder is none of a runner.
        """
        if address:
            raise InputError(f"device {'host:' + address!r}: this machine is host, without more")
        if runner is None:
            return cls()
        *interpreter, program = runner_command(runner)
        return cls(command=(*interpreter, str(runner.resolve() / program)))

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
        output = RunnerOutput(on_event)
        ended = converse(self.command, (write_job(job).encode(),), output.feed, timeout_s=timeout_s)
        if ended.status is None:
            return output.failure(f"no result within {timeout_s:g} s")
        return output.outcome(ended.status, ended.err)

    def close(self) -> None:
        """Nothing was put anywhere."""
