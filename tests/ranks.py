"""Runs one function in several processes that share a run, as `torchrun` starts them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.forked import FORKED

__all__ = ["Ended", "run_ranks"]

_PATIENCE_S = 300


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended, and what it printed."""

    exit_code: int | None
    printed: str


def run_ranks(
    count: int, target: Callable[..., int | None], folder: Path, *arguments: Any
) -> list[Ended]:
    """Runs a function in each of several processes.

    Args:
        count: Of processes.
        target: A module's function; its arguments are the rank and `arguments`, and what it returns
            is the exit code.
        folder: For what they print.
        arguments: Further ones.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"rank-{rank}.log" for rank in range(count)]
    processes = [
        FORKED.Process(target=_run, args=(rank, count, port, log, target, arguments))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_PATIENCE_S)
        if process.is_alive():  # it waits for a message that nobody sends
            process.kill()
            process.join()
    return [
        Ended(exit_code=process.exitcode, printed=log.read_text())
        for process, log in zip(processes, logs, strict=True)
    ]


def _run(
    rank: int,
    count: int,
    port: int,
    log: Path,
    target: Callable[..., int | None],
    arguments: tuple[Any, ...],
) -> None:
    import torch

    torch.set_num_threads(1)
    with log.open("w") as printed:
        for stream in (1, 2):
            os.dup2(printed.fileno(), stream)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    raise SystemExit(target(rank, *arguments) or 0)
