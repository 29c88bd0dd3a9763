"""Every source, on what real systems print and on trees that look like their sysfs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pocketvlm.device_bench.block import SensorSample
from pocketvlm.device_bench.runner.sensors import android, apple, linux
from pocketvlm.device_bench.runner.sensors.reading import merge_readings, read_sensors
from pocketvlm.device_bench.runner.sensors.types import THERMAL_STATUSES, Reading

THERMALSERVICE = """IsStatusOverride: false
ThermalEventListeners:
\tcallbacks: 1
Thermal Status: 2
Cached temperatures:
\tTemperature{mValue=99.0, mType=3, mName=TYPE_SKIN, mStatus=0}
HAL Ready: true
Current temperatures from HAL:
\tTemperature{mValue=-99.9, mType=6, mName=TYPE_POWER_AMPLIFIER, mStatus=0}
\tTemperature{mValue=24.0, mType=0, mName=CPU0, mStatus=0}
\tTemperature{mValue=41.5, mType=3, mName=skin, mStatus=1}
\tTemperature{mValue=77.0, mType=5, mName=usb, mStatus=0}
Current cooling devices from HAL:
\tCoolingDevice{mValue=80, mType=2, mName=TYPE_CPU}
"""
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  Charge counter: 3456000
  status: 2
  level: 85
  voltage: 4011
  temperature: 312
"""


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_android_tells_current_temperatures_from_cached_ones():
    found = android.parse_thermal(THERMALSERVICE)
    assert (found.temperature_c, found.thermal_status) == (41.5, 2)
    assert android.parse_thermal("Permission Denial: can't dump") == Reading()
    assert android.parse_battery(BATTERY)["level"] == "85"


def test_android_reads_both_services(monkeypatch):
    printed = {"thermalservice": THERMALSERVICE, "battery": BATTERY}
    monkeypatch.setattr(android, "_run", lambda _, name: printed[name])
    expected = Reading(temperature_c=41.5, thermal_status=2, battery_percent=85.0, is_charging=True)
    assert android.read() == expected
    monkeypatch.setattr(android, "_run", lambda *_: "")
    assert android.read() == Reading()


def test_linux_takes_the_hottest_sensor_that_can_be_one(tmp_path):
    sys_folder = tree(
        tmp_path,
        {
            "class/thermal/thermal_zone0/temp": "45000\n",
            "class/thermal/thermal_zone1/temp": "-274000\n",
            "class/thermal/thermal_zone2/temp": "no data\n",
            "class/hwmon/hwmon1/temp1_input": "61250\n",
            "class/hwmon/hwmon1/fan1_input": "900000\n",
            "class/power_supply/mouse/type": "Battery",
            "class/power_supply/mouse/scope": "Device",
            "class/power_supply/BAT0/type": "Battery",
            "class/power_supply/BAT0/capacity": "77",
            "class/power_supply/BAT0/status": "Discharging",
            "devices/system/cpu/cpufreq/policy0/scaling_governor": "schedutil\n",
            "devices/system/cpu/cpufreq/policy4/scaling_governor": "performance\n",
        },
    )
    assert linux.read(sys_folder) == Reading(
        temperature_c=61.25, battery_percent=77.0, is_charging=False
    )
    assert linux.governors(sys_folder) == {"0": "schedutil", "4": "performance"}
    assert linux.read(tmp_path / "nothing") == Reading()
    assert linux.governors(tmp_path / "nothing") == {}


def test_a_mac_tells_its_battery():
    on_battery = (
        "Now drawing from 'Battery Power'\n"
        " -InternalBattery-0 (id=1234)\t83%; discharging; 4:12 remaining present: true\n"
    )
    assert apple.parse_battery(on_battery) == Reading(battery_percent=83.0, is_charging=False)
    charging = on_battery.replace("Battery Power", "AC Power")
    assert apple.parse_battery(charging).is_charging
    assert apple.parse_battery("Now drawing from 'AC Power'\n") == Reading()


@pytest.mark.skipif(sys.platform == "darwin", reason="the source is there")
def test_a_source_that_is_not_there_knows_nothing():
    assert apple.read() == Reading()
    assert android.properties() == {}
    assert apple.system_value("hw.model") is None


def test_readings_are_merged_by_value_and_the_hottest_counts():
    first = Reading(temperature_c=40.0, thermal_status=1)
    second = Reading(temperature_c=55.0, thermal_status=3, battery_percent=9.0)
    assert merge_readings(7.0, [first, second]) == SensorSample(
        at_ms=7.0, temperature_c=55.0, thermal_status=1, battery_percent=9.0
    )
    assert merge_readings(7.0, []) == SensorSample(at_ms=7.0)


def test_this_machine_can_be_asked():
    found = read_sensors(3.0)
    assert found.at_ms == 3.0
    assert found.temperature_c is None or 0 < found.temperature_c < 150
    assert found.thermal_status is None or found.thermal_status < len(THERMAL_STATUSES)
