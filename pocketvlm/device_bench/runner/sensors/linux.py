"""Linux: thermal zones and hardware monitors in sysfs, the battery, and clock governors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pocketvlm.device_bench.runner.sensors.types import Reading, is_temperature

__all__ = ["affinity", "battery_folder", "governors", "read", "read_number", "read_text"]

_SYS = Path("/sys")


def read(sys: Path = _SYS) -> Reading:
    """The hottest sensor and the battery.

    Args:
        sys: Where sysfs is mounted.
    """
    battery = battery_folder(sys)
    status = None if battery is None else read_text(battery / "status")
    return Reading(
        temperature_c=max(filter(is_temperature, _temperatures(sys)), default=None),
        battery_percent=None if battery is None else read_number(battery / "capacity"),
        is_charging=None if status is None else status != "Discharging",
    )


def governors(sys: Path = _SYS) -> dict[str, str]:
    """The clock governor of each group of cores, by its first core; empty where none is shown."""
    found = {}
    for policy in sorted((sys / "devices/system/cpu/cpufreq").glob("policy*")):
        name = read_text(policy / "scaling_governor")
        if name is not None:
            found[policy.name.removeprefix("policy")] = name
    return found


def battery_folder(sys: Path = _SYS) -> Path | None:
    """The battery that powers the device; not one of a mouse."""
    for supply in sorted((sys / "class/power_supply").glob("*")):
        if read_text(supply / "type") == "Battery" and read_text(supply / "scope") != "Device":
            return supply
    return None


def read_text(file: Path) -> str | None:
    """The content of a file of sysfs, or `None` if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # a sensor that is off answers with an error of its driver
        return None


def read_number(file: Path) -> float | None:
    """The number in a file of sysfs, or `None` if there is none."""
    try:
        return float(read_text(file) or "")
    except ValueError:
        return None


def _temperatures(sys: Path) -> Iterator[float]:
    """Every temperature in sysfs, in degrees Celsius; files hold thousandths."""
    for pattern in ("class/thermal/thermal_zone*/temp", "class/hwmon/hwmon*/temp*_input"):
        for file in sys.glob(pattern):
            value = read_number(file)
            if value is not None:
                yield value / 1000


def affinity() -> tuple[int, ...] | None:
    """The cores that this process may use."""
    get = getattr(os, "sched_getaffinity", None)
    return None if get is None else tuple(sorted(get(0)))
