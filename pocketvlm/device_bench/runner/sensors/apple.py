"""Apple systems: `ProcessInfo.thermalState`, and `pmset` for the battery of a Mac."""

from __future__ import annotations

import ctypes
import re
import subprocess

from pocketvlm.device_bench.runner.sensors.types import Reading

__all__ = ["parse_battery", "read", "system_value"]

# nominal, fair, serious and critical, as Android would count them.
_STATUSES = (0, 1, 3, 4)
_TIMEOUT_S = 5.0


def read() -> Reading:
    """Thermal state and battery; Apple shows no temperature to programs."""
    battery = parse_battery(_run("/usr/bin/pmset", "-g", "batt"))
    return Reading(
        thermal_status=_thermal_status(),
        battery_percent=battery.battery_percent,
        is_charging=battery.is_charging,
    )


def parse_battery(text: str) -> Reading:
    """Reads `pmset -g batt`; a Mac without a battery prints no line of one."""
    found = re.search(r"InternalBattery.*?(\d+)%;", text)
    if found is None:
        return Reading()
    return Reading(battery_percent=float(found[1]), is_charging="'AC Power'" in text)


def system_value(name: str) -> str | None:
    """A value of `sysctl`, such as `hw.model`."""
    return _run("/usr/sbin/sysctl", "-n", name).strip() or None


def _thermal_status() -> int | None:
    """`ProcessInfo.processInfo.thermalState`, by the runtime of Objective-C."""
    try:
        objc = ctypes.CDLL("/usr/lib/libobjc.dylib")
        ctypes.CDLL("/System/Library/Frameworks/Foundation.framework/Foundation")
    except OSError:
        return None
    objc.objc_getClass.restype = objc.sel_registerName.restype = ctypes.c_void_p
    objc.objc_getClass.argtypes = objc.sel_registerName.argtypes = [ctypes.c_char_p]

    def send(receiver: int, selector: bytes, kind: type[ctypes.c_void_p | ctypes.c_long]) -> int:
        call = ctypes.CFUNCTYPE(kind, ctypes.c_void_p, ctypes.c_void_p)(("objc_msgSend", objc))
        return int(call(receiver, objc.sel_registerName(selector)) or 0)

    info = send(objc.objc_getClass(b"NSProcessInfo"), b"processInfo", ctypes.c_void_p)
    state = send(info, b"thermalState", ctypes.c_long)
    return _STATUSES[state] if 0 <= state < len(_STATUSES) else None


def _run(*command: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603  (a command of the system)
            command, capture_output=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace")
