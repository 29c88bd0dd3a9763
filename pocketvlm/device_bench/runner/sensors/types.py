"""What one source of sensors answers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["THERMAL_STATUSES", "Reading", "is_temperature"]

THERMAL_STATUSES = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
"""Names of the thermal states 0 to 6, as Android counts them."""

_COLDEST_C, _HOTTEST_C = -40.0, 150.0


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The values that a source knows; the fields are those of `SensorSample`."""

    temperature_c: float | None = None
    thermal_status: int | None = None
    battery_percent: float | None = None
    is_charging: bool | None = None


def is_temperature(value_c: float) -> bool:
    """Whether a number can be the temperature of a device; absent sensors report -99.9 or 0."""
    return _COLDEST_C < value_c < _HOTTEST_C and value_c != 0.0
