"""The order of a run's processes, and what came of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pocketvlm.device_bench.block import Block
from pocketvlm.device_bench.controller.cooling import Wait

__all__ = ["Outcome", "Process", "schedule"]


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process of the schedule: its arm and the number of the repeat."""

    arm: str
    repeat: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one process.

    Attributes:
        process: The process.
        block: Its measurement; of a process that died, what its events had told by then, or `None`.
        failure: Why it returned no result.
        started_s: When it was started, in seconds after the start of the run.
        wait: How long it waited for the device to cool.
    """

    process: Process
    block: Block | None
    failure: str | None = None
    started_s: float = 0.0
    wait: Wait = field(default_factory=Wait)


def schedule(repeats: int, arms: Sequence[str]) -> tuple[Process, ...]:
    """The order of the processes: every arm once per repeat, always in the same order."""
    return tuple(Process(arm=arm, repeat=repeat) for repeat in range(repeats) for arm in arms)
