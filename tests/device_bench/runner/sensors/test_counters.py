"""Counters of energy and memory, on this system and on trees and calls that look like others."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import time

import pytest

from pocketvlm.device_bench.runner.phases import EnergyMeter, MemoryMeter, PhaseClock, snapshot
from pocketvlm.device_bench.runner.sensors.energy import (
    BatteryCharge,
    Charge,
    EnergyCounter,
    RaplEnergy,
    android_charge,
    find_energy_counter,
)
from pocketvlm.device_bench.runner.sensors.memory import (
    AppleMemory,
    LinuxMemory,
    MemoryCounter,
    RusageInfo,
    find_memory_counter,
)
from tests.device_bench.rig import make_answer
from tests.device_bench.runner.sensors.test_sources import tree

MB = 2**20


def rapl(tmp_path, **joules):
    files = {}
    for index, (name, value) in enumerate(joules.items()):
        zone = f"class/powercap/intel-rapl:{index}"
        files |= {
            f"{zone}/name": name,
            f"{zone}/energy_uj": str(int(value * 1e6)),
            f"{zone}/max_energy_range_uj": str(int(1000e6)),
            f"{zone}/intel-rapl:{index}:0/name": "core",
            f"class/powercap/intel-rapl:{index}:0/name": "core",
            f"class/powercap/intel-rapl:{index}:0/energy_uj": "1",
        }
    return tree(tmp_path, files)


def test_packages_are_added_and_their_parts_are_not(tmp_path):
    counter = RaplEnergy.find(rapl(tmp_path, package_0=10.0, package_1=20.0))
    assert counter.name == "RAPL package_0, package_1"
    assert counter.read_j() == 0.0
    rapl(tmp_path, package_0=12.5, package_1=21.0)
    assert counter.read_j() == pytest.approx(3.5)


def test_the_platform_is_counted_once_and_a_counter_may_begin_again(tmp_path):
    counter = RaplEnergy.find(rapl(tmp_path, package_0=1.0, psys=999.0))
    assert counter.name == "RAPL psys"
    rapl(tmp_path, package_0=500.0, psys=2.0)
    assert counter.read_j() == pytest.approx(3.0, abs=1e-5)


def test_a_counter_that_cannot_be_read_is_none(tmp_path):
    sys_folder = rapl(tmp_path, package_0=10.0)
    (sys_folder / "class/powercap/intel-rapl:0/energy_uj").unlink()
    assert RaplEnergy.find(sys_folder) is None
    assert find_energy_counter(tmp_path / "nothing") is None


def test_a_battery_counts_while_it_alone_powers_the_device():
    charges = [
        Charge(coulombs=100.0, volts=4.0, is_discharging=True),
        Charge(coulombs=98.0, volts=4.0, is_discharging=True),
        Charge(coulombs=97.0, volts=3.0, is_discharging=True),
        Charge(coulombs=97.0, volts=4.0, is_discharging=False),
        Charge(coulombs=90.0, volts=4.0, is_discharging=True),
    ]
    counter = BatteryCharge(iter(charges).__next__)
    assert counter.read_j() == pytest.approx(8.0)
    assert counter.read_j() == pytest.approx(11.5)
    assert counter.read_j() is None
    assert counter.read_j() is None


def test_android_counts_in_microampere_hours():
    lines = {"Charge counter": "1000000", "voltage": "4000", "USB powered": "false"}
    assert android_charge(lines) == Charge(coulombs=3600.0, volts=4.0, is_discharging=True)
    assert not android_charge({**lines, "USB powered": "true"}).is_discharging
    assert android_charge({}) is None


def test_a_laptop_battery_that_counts_energy(tmp_path):
    files = {"type": "Battery", "status": "Discharging", "voltage_now": "10000000"}
    files |= {"energy_now": "5000000"}
    bat = {f"class/power_supply/BAT0/{name}": text for name, text in files.items()}
    counter = find_energy_counter(tree(tmp_path, bat))
    assert isinstance(counter, BatteryCharge)
    (tmp_path / "class/power_supply/BAT0/energy_now").write_text("4900000")
    assert counter.read_j() == pytest.approx(0.1 * 3600, rel=1e-6)


class Scripted(EnergyCounter):
    name, scope, is_fine = "scripted", "everything", True

    def __init__(self, *values):
        self.values = list(values)

    def read_j(self):
        return self.values.pop(0)


def one_turn(meter):
    meter.begin_turn()
    for stage in ("preprocess", "vision", "tokenize", "prefill", "sample", "detokenize", "decode"):
        meter.end_stage(stage)
    meter.end_stage("detokenize")
    meter.end_turn(make_answer())


def test_energy_is_told_by_stage_where_the_counter_is_fine():
    meter = EnergyMeter(Scripted(0.0, 2.0, 5.0, 6.0))  # begin, picture, first token, end
    one_turn(meter)
    found = meter.energy(answers=1, pictures=1)
    assert (found.total_j, found.j_per_image) == (6.0, 2.0)
    assert found.mj_per_token == pytest.approx(1000 / 4)
    assert found.is_by_stage
    assert "everything" in found.scope


def test_energy_of_a_coarse_counter_is_that_of_whole_answers():
    counter = Scripted(0.0, 5.0, 7.0, 12.0)
    counter.is_fine = False
    meter = EnergyMeter(counter)
    for _ in range(2):
        one_turn(meter)
    found = meter.energy(answers=2, pictures=2)
    assert (found.total_j, found.j_per_image, found.is_by_stage) == (10.0, None, False)
    assert found.mj_per_token == pytest.approx(1000.0)


def test_energy_that_was_lost_for_a_moment_is_not_published():
    meter = EnergyMeter(Scripted(0.0, None, None, 6.0))
    one_turn(meter)
    assert meter.energy(answers=1, pictures=1) is None
    assert EnergyMeter(None).energy(answers=1, pictures=0) is None


@pytest.mark.skipif(sys.platform != "linux", reason="procfs")
def test_linux_tells_peaks_apart():
    counter = find_memory_counter([os.getpid()])
    assert counter.name == "VmHWM"
    assert counter.forget_peak()
    before = counter.peak_bytes()
    # Of the system, not of the heap, which may keep what it was given back.
    with mmap.mmap(-1, 64 * MB) as ballast:
        for place in range(0, len(ballast), mmap.PAGESIZE):
            ballast[place] = 1
    assert counter.peak_bytes() - before > 60 * MB
    counter.forget_peak()
    assert counter.peak_bytes() - before < 10 * MB
    assert 0 < counter.shared_out_bytes() <= counter.resident_bytes() + MB


@pytest.mark.skipif(sys.platform != "linux", reason="procfs")
def test_processes_are_added_and_one_that_ended_is_not_guessed():
    program = "import sys; held = bytearray(50 << 20); print(flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-S", "-c", program], **pipes) as child:
        child.stdout.readline()
        alone, both = LinuxMemory([os.getpid()]), LinuxMemory([os.getpid(), child.pid])
        assert both.peak_bytes() - alone.peak_bytes() > 50 * MB
        assert both.forget_peak()
        child.stdin.close()
        child.wait()
        assert both.resident_bytes() is None
        assert not both.forget_peak()


def test_apple_counts_the_footprint():
    assert ctypes.sizeof(RusageInfo) == 296
    assert RusageInfo.phys_footprint.offset == 72
    assert RusageInfo.lifetime_max_phys_footprint.offset == 240
    assert RusageInfo.interval_max_phys_footprint.offset == 280

    def usage(pid, info):
        info.resident_size, info.phys_footprint = 1, 10 * pid
        info.lifetime_max_phys_footprint, info.interval_max_phys_footprint = 90 * pid, 20 * pid
        return 0

    counter = AppleMemory([1, 2], usage, lambda _: 0)
    assert (counter.resident_bytes(), counter.peak_bytes()) == (30, 270)
    assert counter.forget_peak()
    assert counter.peak_bytes() == 60
    assert not AppleMemory([1], usage, None).forget_peak()
    assert AppleMemory([1], lambda *_: -1, None).peak_bytes() is None
    assert sys.platform == "darwin" or AppleMemory.of_system([1]) is None


class ScriptedMemory(MemoryCounter):
    name = "scripted"

    def __init__(self, peaks, *, can_forget=True):
        self.peaks, self.can_forget = list(peaks), can_forget

    def resident_bytes(self):
        return 5

    def shared_out_bytes(self):
        return 4

    def peak_bytes(self):
        return self.peaks.pop(0)

    def forget_peak(self):
        return self.can_forget


def turns_of_memory(counter):
    meter = MemoryMeter(counter, snapshot(counter))
    meter.end_load()
    for _ in range(2):
        meter.begin_turn()
        for stage in ("prefill", "detokenize", "decode", "detokenize"):
            meter.end_stage(stage)
        meter.end_turn()
    return meter.memory()


def test_peaks_of_phases_are_the_worst_of_all_turns():
    found = turns_of_memory(ScriptedMemory([50, 90, 60, 70, 65]))
    assert (found.peak_prefill_rss_bytes, found.peak_decode_rss_bytes) == (90, 65)
    assert (found.peak_rss_bytes, found.counter) == (90, "scripted")
    assert (found.after_rss_bytes, found.before_load_pss_bytes) == (5, 4)


def test_peaks_that_cannot_be_told_apart_are_not_claimed():
    found = turns_of_memory(ScriptedMemory([50, 90, 90, 90, 90], can_forget=False))
    assert (found.peak_prefill_rss_bytes, found.peak_decode_rss_bytes) == (None, None)
    assert found.peak_rss_bytes == 90
    unknown = turns_of_memory(None)
    assert unknown.peak_rss_bytes is None
    assert unknown.counter is None


def test_what_is_done_where_a_stage_ends_is_charged_to_no_stage():
    clock = PhaseClock(lambda _: time.sleep(0.05))
    clock.lap("prefill")
    clock.lap("sample")
    assert clock.laps("sample")[0] < 40
