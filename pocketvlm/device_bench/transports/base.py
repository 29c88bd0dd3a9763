"""How a job reaches the device that runs it.

A transport never raises because of what a device does during a job: a crash, a timeout or garbage
in the output is a `Failure` with a reason, because a failed measurement belongs in the report.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import ClassVar, Self

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.protocol import Failure, Job, Result
from pocketvlm.device_bench.transports.output import EventCallback, ignore_event

__all__ = ["Connection", "EventCallback", "Transport", "ignore_event"]


class Transport(ABC):
    """Reaches one device; its fields say which.

    Attributes:
        kind: The word that its addresses begin with.
        has_real_time: Whether a second of the device is one of this machine.
    """

    kind: ClassVar[str]
    has_real_time: ClassVar[bool] = True

    @abstractmethod
    def connect(self) -> Connection:
        """Connects to the device.

        Raises:
            InputError: It cannot be reached, or several devices could be the one.
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
