"""Transports: how a job reaches the device that runs it. The only one so far is for this host.

A transport never raises because of the device: a crash, a timeout or garbage in the output is a
`Failure` with a reason, because a failed measurement belongs in the report.
"""

from __future__ import annotations

import json
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketvlm.child_process import module_command, start_child
from pocketvlm.device_bench.worker import WORKER_SCHEMA

__all__ = ["Failure", "HostTransport", "Transport"]

_WORKER = tuple(module_command("pocketvlm.device_bench.worker"))
_LAST_WORDS = 240


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a job returned no result."""

    reason: str


class Transport(ABC):
    """Runs jobs on one device."""

    @abstractmethod
    def run(self, job: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any] | Failure:
        """Runs one job in a fresh process on the device.

        Args:
            job: A job for `worker.run_job`, without `schema`.
            timeout_s: Seconds until the process is killed.
        """


@dataclass(frozen=True, kw_only=True)
class HostTransport(Transport):
    """Runs the worker as a child process.

    Attributes:
        command: The worker's command line.
    """

    command: tuple[str, ...] = _WORKER

    def run(self, job: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any] | Failure:
        """Runs one job in a child process, which is killed with its children after the timeout."""
        with start_child(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a timeout or Ctrl-C also ends its children
        ) as process:
            try:
                out, err = process.communicate(
                    json.dumps({"schema": WORKER_SCHEMA, **job}), timeout=timeout_s
                )
            except subprocess.TimeoutExpired:
                return Failure(reason=f"no result within {timeout_s:g} s")
        return read_result(out, err, process.returncode)


def read_result(out: str, err: str, returncode: int) -> Mapping[str, Any] | Failure:
    """Parses the last line of a worker's output, or returns why there is no result.

    Args:
        out: Its standard output.
        err: Its standard error.
        returncode: Its exit status; negative for the signal that ended it.
    """
    if returncode < 0:
        name = signal.Signals(-returncode).name
        hint = "; the system does this when memory runs out" if name == "SIGKILL" else ""
        return Failure(reason=f"the worker was ended by {name}{hint}{_last_words(err)}")
    try:
        document = json.loads(out.rstrip("\n").rpartition("\n")[2])
    except json.JSONDecodeError:
        return Failure(
            reason=f"the worker ended with status {returncode} and no result{_last_words(err)}"
        )
    if not isinstance(document, dict) or document.get("schema") != WORKER_SCHEMA:
        return Failure(reason="the last line of the worker is not a result of this protocol")
    if document.get("status") == "failed":
        return Failure(reason=str(document.get("reason")))
    result = document.get("result")
    if returncode != 0 or not isinstance(result, dict):
        return Failure(reason=f"the worker ended with status {returncode}{_last_words(err)}")
    return result


def _last_words(err: str) -> str:
    lines = err.strip().splitlines()
    return f": {lines[-1][:_LAST_WORDS]}" if lines else ""
