"""The device, and the conditions on it, which vary from hour to hour."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pocketvlm.device_bench.runner.bandwidth import last_level_cache_bytes, memory_read_bytes_s
from pocketvlm.device_bench.runner.sensors import android, apple, linux
from pocketvlm.device_bench.runner.sensors.reading import read_sensors
from pocketvlm.machine import describe_environment

__all__ = ["describe_device"]

_BOARD = Path("/proc/device-tree/model")


def describe_device(threads: int) -> dict[str, Any]:
    """Everything of the environment block that the device itself knows.

    Args:
        threads: Threads of the heavy graphs, with which the memory is read too.
    """
    sensors = read_sensors(0.0)
    governors = linux.governors()
    kinds = sorted(set(governors.values()))
    return {
        **describe_environment(threads),
        **_product(),
        "load_average_1m": _load_average(),
        "governor": ", ".join(kinds) if kinds else None,
        "governors": governors,
        "affinity": linux.affinity(),
        "battery_percent": sensors.battery_percent,
        "is_charging": sensors.is_charging,
        "temperature_c": sensors.temperature_c,
        "thermal_status": sensors.thermal_status,
        "memory_read_bytes_s": round(memory_read_bytes_s(threads)),
        "last_level_cache_bytes": last_level_cache_bytes(),
    }


def _product() -> Mapping[str, str | None]:
    """Which product and system on a chip this is, and which build of the system."""
    if sys.platform == "darwin":
        build = apple.system_value("kern.osversion")
        return {
            "product": apple.system_value("hw.model"),
            "soc": apple.system_value("machdep.cpu.brand_string"),
            "os_build": f"macOS {platform.mac_ver()[0]} ({build})",
        }
    if android.is_android():
        found = android.properties()
        names = ("ro.soc.manufacturer", "ro.soc.model")
        return {
            "product": found.get("ro.product.model"),
            "soc": " ".join(filter(None, map(found.get, names))) or found.get("ro.board.platform"),
            "os_build": found.get("ro.build.fingerprint"),
        }
    board = linux.read_text(_BOARD)
    release: Mapping[str, str] = {}
    with suppress(OSError):
        release = platform.freedesktop_os_release()
    return {
        "product": None if board is None else board.rstrip("\0"),
        "soc": None,
        "os_build": " ".join(filter(None, (release.get("PRETTY_NAME"), platform.version()))),
    }


def _load_average() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:  # Android keeps it from programs
        return None
