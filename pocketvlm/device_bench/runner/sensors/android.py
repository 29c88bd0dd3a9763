"""Android: what `dumpsys` says, where the runner runs as the shell's user, as over adb."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from pocketvlm.device_bench.runner.sensors.types import Reading, is_temperature

__all__ = [
    "Battery",
    "is_android",
    "parse_battery",
    "parse_thermal",
    "properties",
    "read",
    "read_battery",
]

_DUMPSYS, _GETPROP = Path("/system/bin/dumpsys"), Path("/system/bin/getprop")
_TIMEOUT_S = 5.0
_CURRENT, _END = "Current temperatures from HAL:", "Current cooling devices"
# What the thermal HAL calls processors, battery and skin; others are modems and chargers.
_COUNTED = {"0", "1", "2", "3", "9"}
_CHARGING, _FULL = "2", "5"

Battery = Mapping[str, str]
"""The lines of `dumpsys battery`, by their names."""


def is_android() -> bool:
    """Whether this is Android, whatever Python calls the platform."""
    return _DUMPSYS.exists()


def read() -> Reading:
    """Thermal state, the hottest of processors, skin and battery, and the battery's charge."""
    thermal = parse_thermal(_run(_DUMPSYS, "thermalservice"))
    battery = read_battery()
    temperatures = [thermal.temperature_c]
    if battery.get("temperature", "").isdecimal():
        temperatures.append(int(battery["temperature"]) / 10)
    level = battery.get("level", "")
    return Reading(
        temperature_c=max((t for t in temperatures if t is not None), default=None),
        thermal_status=thermal.thermal_status,
        battery_percent=float(level) if level.isdecimal() else None,
        is_charging=battery["status"] in (_CHARGING, _FULL) if "status" in battery else None,
    )


def parse_thermal(text: str) -> Reading:
    """Reads `dumpsys thermalservice`; cached temperatures are not current ones."""
    status = re.search(r"^Thermal Status: ([0-6])\b", text, re.MULTILINE)
    current = text.partition(_CURRENT)[2].partition(_END)[0]
    found = re.findall(r"Temperature\{mValue=([-.\d]+), mType=(\d+)", current)
    values = [float(value) for value, kind in found if kind in _COUNTED]
    return Reading(
        temperature_c=max(filter(is_temperature, values), default=None),
        thermal_status=None if status is None else int(status[1]),
    )


def parse_battery(text: str) -> Battery:
    """Reads `dumpsys battery`."""
    lines = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines if value}


def read_battery() -> Battery:
    """The battery now."""
    return parse_battery(_run(_DUMPSYS, "battery"))


def properties() -> Mapping[str, str]:
    """The system's properties (`getprop`), by name."""
    return dict(re.findall(r"^\[([^]]+)\]: \[([^]]*)\]", _run(_GETPROP), re.MULTILINE))


def _run(command: Path, *arguments: str) -> str:
    """What a command prints; nothing where it is refused."""
    try:
        done = subprocess.run(  # noqa: S603  (a command of the system)
            [str(command), *arguments],
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace")
