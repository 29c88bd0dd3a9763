"""One look at all sensors of this device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields

from pocketvlm.device_bench.block import SensorSample
from pocketvlm.device_bench.runner.sensors import android, apple, linux
from pocketvlm.device_bench.runner.sensors.types import Reading

__all__ = ["merge_readings", "read_sensors"]

Source = Callable[[], Reading]


def read_sensors(at_ms: float) -> SensorSample:
    """What the sensors say now.

    Args:
        at_ms: The time of the sample, as `SensorSample` has it.
    """
    return merge_readings(at_ms, [source() for source in _sources()])


def merge_readings(at_ms: float, readings: Sequence[Reading]) -> SensorSample:
    """One sample: of each value, the first that is known; of temperatures, the highest."""
    known = {
        field.name: next(
            (value for one in readings if (value := getattr(one, field.name)) is not None), None
        )
        for field in fields(Reading)
    }
    known["temperature_c"] = max(
        (one.temperature_c for one in readings if one.temperature_c is not None), default=None
    )
    return SensorSample(at_ms=at_ms, **known)


def _sources() -> Sequence[Source]:
    if sys.platform == "darwin":
        return (apple.read,)
    return (android.read, linux.read) if android.is_android() else (linux.read,)
