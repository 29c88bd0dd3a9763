"""Other runtimes beside ours: each serves a benchmark from its own environment.

A worker is a script that is started with a model, a number of threads and a clock. It says `ready`
once it has loaded what it exports on its first start, and answers each line with one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Peer", "started_peer"]


class Peer:
    """A worker that serves."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Takes a worker that has said `ready`."""
        self._process = process

    def ask(self, *words: str | int) -> dict[str, Any]:
        """Sends a line, and reads the answer.

        Raises:
            SystemExit: The worker has ended.
        """
        asks, answers = self._process.stdin, self._process.stdout
        if asks is None or answers is None:  # both are pipes
            raise TypeError
        asks.write(" ".join(map(str, words)) + "\n")
        asks.flush()
        line = answers.readline()
        if not line:
            raise SystemExit(f"{self._process.args!r} ended; its own words are above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def started_peer(
    python: Path, script: str, model: Path, *, threads: int, clock: str
) -> Iterator[Peer]:
    """Starts a worker, and ends it afterwards.

    Args:
        python: The interpreter of the worker's environment.
        script: The worker, beside this file.
        model: The checkpoint that it exports.
        threads: Threads of the runtime.
        clock: `wall` or `cpu`.

    Raises:
        SystemExit: It does not start.
    """
    command = [str(python), str(Path(__file__).with_name(script)), str(model), str(threads), clock]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        if process.stdout is None or process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{command[1]}: did not start; its own words are above")
        try:
            yield Peer(process)
        finally:
            process.terminate()
