"""How a job reaches the device that runs it.

A transport never raises because of what a device does during a job: a crash, a timeout or garbage
in the output is a `Failure` with a reason, because a failed measurement belongs in the report.
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import ClassVar, Self

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.protocol import Event, Failure, Job, Result, parse_event, parse_result

__all__ = ["Connection", "EventCallback", "Transport", "ignore_event", "read_output"]

EventCallback = Callable[[Event], None]
_LAST_WORDS = 240


def ignore_event(event: Event) -> None:
    """Does nothing."""


class Transport(ABC):
    """Reaches one device; its fields say which."""

    kind: ClassVar[str]

    @abstractmethod
    def connect(self) -> Connection:
        """Connects to the device.

        Raises:
            InputError: It cannot be reached, or it is not clear which device is meant.
        """


class Connection(ABC):
    """An open connection; at the end of the block, what it put on the device is removed."""

    @abstractmethod
    def install(self, bundle: Bundle) -> str:
        """Brings a bundle to the device, and returns its folder there.

        Raises:
            InputError: The device has no space, or vanished.
        """

    @abstractmethod
    def run(
        self, job: Job, *, timeout_s: float, on_event: EventCallback = ignore_event
    ) -> Result | Failure:
        """Runs one job in a fresh process on the device.

        Args:
            job: The job.
            timeout_s: Seconds until the process is ended.
            on_event: Called for every event, as it arrives.
        """

    @abstractmethod
    def close(self) -> None:
        """Removes what was put on the device, and disconnects."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_output(lines: Sequence[str], err: str, returncode: int) -> Result | Failure:
    """What a runner's output says.

    Args:
        lines: Its standard output.
        err: Its standard error.
        returncode: Its exit status; negative for the signal that ended it.
    """
    events = tuple(event for event in map(parse_event, lines) if event is not None)
    if returncode < 0:
        name = signal.Signals(-returncode).name
        hint = "; the system does this when memory runs out" if name == "SIGKILL" else ""
        return Failure(
            reason=f"the runner was ended by {name}{hint}{_last_words(err)}", events=events
        )
    outcome = parse_result(lines[-1]) if lines else None
    if isinstance(outcome, Failure):
        return Failure(reason=outcome.reason, events=events)
    if outcome is None:
        return Failure(
            reason=f"the runner ended with status {returncode} and no result{_last_words(err)}",
            events=events,
        )
    if returncode != 0:
        return Failure(
            reason=f"the runner ended with status {returncode}{_last_words(err)}", events=events
        )
    return outcome


def _last_words(err: str) -> str:
    lines = err.strip().splitlines()
    return f": {lines[-1][:_LAST_WORDS]}" if lines else ""
