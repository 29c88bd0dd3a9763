"""Thermal preconditions: no process starts on a device that is hotter than allowed.

A hot device is slower, and a run that began hot compares what was measured first with what was
measured last. Waiting has a limit; when it is reached, the process starts all the same, and the
report says so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from pocketvlm.device_bench.block import SensorSample
from pocketvlm.device_bench.protocol import Failure, SensorsJob
from pocketvlm.device_bench.transports.base import Connection
from pocketvlm.errors import InputError
from pocketvlm.json_io import DecodeError, decode

__all__ = ["Cooling", "Wait", "read_sensors", "wait_until_cool"]

_READING_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Cooling:
    """When a device is cool.

    Attributes:
        max_temperature_c: The hottest sensor, in degrees Celsius; `None` for any temperature.
        max_status: Thermal status of 0 (none) to 6 (shutdown); `None` for any.
        time_limit_s: Seconds to wait before one process.
        every_s: Seconds between two readings.
    """

    max_temperature_c: float | None = None
    max_status: int | None = None
    time_limit_s: float = 600.0
    every_s: float = 5.0

    def require_sensors(self, sample: SensorSample | None) -> None:
        """Checks that the device tells what is waited for.

        Raises:
            InputError: It does not.
        """
        if self.max_temperature_c is not None and (sample is None or sample.temperature_c is None):
            raise InputError(
                "the device tells no temperature to wait for; leave --max-temperature out"
            )
        if self.max_status is not None and (sample is None or sample.thermal_status is None):
            raise InputError(
                "the device tells no thermal status to wait for; leave --max-thermal-status out"
            )

    def is_met(self, sample: SensorSample | None) -> bool:
        """Whether a device that says this is cool; one that says nothing is not."""
        if sample is None:
            return False
        temperature_c, status = sample.temperature_c, sample.thermal_status
        return (
            self.max_temperature_c is None
            or (temperature_c is not None and temperature_c <= self.max_temperature_c)
        ) and (self.max_status is None or (status is not None and status <= self.max_status))


@dataclass(frozen=True, kw_only=True)
class Wait:
    """How waiting ended.

    Attributes:
        waited_s: How long it took.
        is_cool: Whether the device was cool in the end.
    """

    waited_s: float = 0.0
    is_cool: bool = True


def read_sensors(connection: Connection) -> SensorSample | None:
    """What the device's sensors say now; `None` if it does not answer."""
    found = connection.run(SensorsJob(), timeout_s=_READING_TIMEOUT_S)
    if isinstance(found, Failure):
        return None
    try:
        return decode(SensorSample, found)
    except DecodeError:
        return None


def wait_until_cool(connection: Connection, cooling: Cooling) -> Wait:
    """Reads the sensors until the device is cool, or the time limit is reached."""
    started = time.monotonic()
    while True:
        is_cool = cooling.is_met(read_sensors(connection))
        waited_s = time.monotonic() - started
        if is_cool or waited_s + cooling.every_s > cooling.time_limit_s:
            return Wait(waited_s=round(waited_s, 1), is_cool=is_cool)
        time.sleep(cooling.every_s)
