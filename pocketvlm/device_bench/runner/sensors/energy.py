"""Counters of energy: all of them count the whole device and everything that runs on it."""

from __future__ import annotations

import sys as python
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pocketvlm.device_bench.runner.sensors import android
from pocketvlm.device_bench.runner.sensors.linux import battery_folder, read_number, read_text

__all__ = [
    "BatteryCharge",
    "Charge",
    "EnergyCounter",
    "RaplEnergy",
    "android_charge",
    "find_energy_counter",
]

_SYS = Path("/sys")


class EnergyCounter(ABC):
    """A counter that rises while the device works.

    Attributes:
        name: What counts.
        scope: What is counted.
        is_fine: Whether it is fine enough to tell the stages of an answer apart.
    """

    name: str
    scope: ClassVar[str]
    is_fine: ClassVar[bool]

    @abstractmethod
    def read_j(self) -> float | None:
        """Joules since the counter was opened; `None` where it stopped making sense."""


class RaplEnergy(EnergyCounter):
    """Intel's and AMD's running average power limit: a counter for each processor package."""

    scope = "whole system: processor packages, with everything that runs on them"
    is_fine = True

    def __init__(self, zones: dict[Path, str]) -> None:
        """Begins to count.

        Args:
            zones: Folders of sysfs and their names.
        """
        self.name = f"RAPL {', '.join(zones.values())}"
        self._total_j = 0.0
        self._last = {zone: read_number(zone / "energy_uj") for zone in zones}

    @classmethod
    def find(cls, sys: Path = _SYS) -> RaplEnergy | None:
        """The widest zones that can be read: the platform, or else every package."""
        zones = {}
        for zone in sorted((sys / "class/powercap").glob("intel-rapl:*")):
            name = read_text(zone / "name")
            is_part = zone.name.count(":") > 1
            if name and not is_part and read_number(zone / "energy_uj") is not None:
                zones[zone] = name
        platform = {zone: name for zone, name in zones.items() if name == "psys"}
        return cls(platform or zones) if zones else None

    def read_j(self) -> float | None:
        """Joules of all zones; a counter that began again is continued."""
        for zone, last in self._last.items():
            now = read_number(zone / "energy_uj")
            if now is None or last is None:
                return None
            risen = now - last
            if risen < 0:
                risen += (read_number(zone / "max_energy_range_uj") or 0.0) + 1
            self._total_j += max(risen, 0.0) / 1e6
            self._last[zone] = now
        return self._total_j


@dataclass(frozen=True, kw_only=True)
class Charge:
    """The battery at one moment.

    Attributes:
        coulombs: What it holds.
        volts: Its voltage.
        is_discharging: Whether it alone powers the device.
    """

    coulombs: float
    volts: float
    is_discharging: bool


class BatteryCharge(EnergyCounter):
    """What the battery's gauge counts, times its voltage; nothing while it is being charged."""

    name = "battery charge"
    scope = "whole system, screen and radios included"
    is_fine = False

    def __init__(self, read_charge: Callable[[], Charge | None]) -> None:
        """Begins to count.

        Args:
            read_charge: Asks the gauge.
        """
        self._read_charge = read_charge
        self._last = read_charge()
        self._total_j = 0.0

    def read_j(self) -> float | None:
        """Joules so far; `None` once the device has been plugged in."""
        last, now = self._last, self._read_charge()
        self._last = now
        if last is None or now is None or not (last.is_discharging and now.is_discharging):
            self._last = None
            return None
        self._total_j += (last.coulombs - now.coulombs) * (last.volts + now.volts) / 2
        return self._total_j


def find_energy_counter(sys: Path = _SYS) -> EnergyCounter | None:
    """The finest counter of this device; `None` where there is none, or it may not be read."""
    rapl = RaplEnergy.find(sys)
    if rapl is not None or python.platform == "darwin":
        return rapl
    charge = _android_charge if android.is_android() else lambda: _linux_charge(sys)
    first = charge()
    return BatteryCharge(charge) if first is not None and first.is_discharging else None


def _android_charge() -> Charge | None:
    return android_charge(android.read_battery())


def android_charge(battery: android.Battery) -> Charge | None:
    """The charge in the lines of `dumpsys battery`: microampere-hours and millivolts."""
    counter, voltage = battery.get("Charge counter", ""), battery.get("voltage", "")
    if not (counter.isdecimal() and voltage.isdecimal()):
        return None
    powered = any(name.endswith("powered") and on == "true" for name, on in battery.items())
    return Charge(
        coulombs=int(counter) * 3600e-6, volts=int(voltage) / 1e3, is_discharging=not powered
    )


def _linux_charge(sys: Path) -> Charge | None:
    folder = battery_folder(sys)
    if folder is None:
        return None
    volts, charge = read_number(folder / "voltage_now"), read_number(folder / "charge_now")
    energy = read_number(folder / "energy_now")  # some gauges count microwatt-hours
    if volts is None or (charge is None and energy is None):
        return None
    microampere_hours = charge if charge is not None else (energy or 0.0) / (volts / 1e6)
    return Charge(
        coulombs=microampere_hours * 3600e-6,
        volts=volts / 1e6,
        is_discharging=read_text(folder / "status") == "Discharging",
    )
