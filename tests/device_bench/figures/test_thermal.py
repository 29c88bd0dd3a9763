"""Waiting for a cool device, its temperature in the report, and what a long run does to it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pocketvlm.device_bench.block import SensorSample
from pocketvlm.device_bench.controller.bench import BenchOptions
from pocketvlm.device_bench.controller.cooling import Cooling
from pocketvlm.device_bench.transports.simulated import SimulatedTransport
from pocketvlm.device_bench.transports.simulation import Heat, Simulation
from pocketvlm.errors import InputError
from tests.device_bench.rig import SCRIPTED, ScriptedTransport, bench


def test_a_device_is_waited_for_until_it_is_cool(tiny_bundle, block):
    readings = [SensorSample(at_ms=0, temperature_c=degrees) for degrees in (30, 50, 45, 39)]
    transport = ScriptedTransport([block()] * 5, sensors=[*readings, *[readings[0]] * 4])
    cooling = Cooling(max_temperature_c=40, every_s=0)
    result = bench([tiny_bundle], transport=transport, options=BenchOptions(cooling=cooling))
    assert transport.sensors == []
    assert result.arms["bundle"].sensors is None  # it did not wait for long
    hot = ScriptedTransport([block()] * 5, sensors=[readings[1]] * 6)
    never = replace(cooling, time_limit_s=0, every_s=1)
    result = bench([tiny_bundle], transport=hot, options=BenchOptions(cooling=never))
    assert result.arms["bundle"].sensors.starts_warm == 5
    assert any("5 processes started above the thermal limit" in note for note in result.notes)
    for asked, lacking in (
        (Cooling(max_temperature_c=40), "no temperature to wait for"),
        (Cooling(max_status=0), "no thermal status to wait for"),
    ):
        blind = ScriptedTransport([], sensors=[SensorSample(at_ms=0)])
        with pytest.raises(InputError, match=lacking):
            bench([tiny_bundle], transport=blind, options=BenchOptions(cooling=asked))


def test_temperature_and_a_long_run_of_a_device_that_throttles(tiny_bundle):
    heat = (
        Heat(at_s=0, temperature_c=30),
        Heat(at_s=60, temperature_c=44, thermal_status=1),
        Heat(at_s=70, temperature_c=48, thermal_status=2, slower=2.0),
        Heat(at_s=400, temperature_c=50, thermal_status=2, slower=2.0),
    )
    script = Simulation(heat=heat, noise=0.0)
    workload = replace(SCRIPTED, sustained_s=300.0, turns=2)
    result = bench([tiny_bundle], workload, transport=SimulatedTransport(simulation=script))
    arm = result.arms["bundle"]
    sensors, sustained = arm.sensors, arm.sustained
    assert sensors.before_c < 31
    assert sensors.peak_c == sensors.after_c == pytest.approx(50, abs=1)
    assert (sensors.status_before, sensors.status_peak) == (0, 2)
    assert sustained.duration_s == pytest.approx(300, abs=2)
    assert sustained.decode_tok_s.retained == pytest.approx(0.5, abs=0.02)
    assert sustained.ttft_user_ms.retained == pytest.approx(0.5, abs=0.02)
    assert list(sustained.time_to_status_s) == ["light", "moderate"]
    # Two turns: the later one has its own figures.
    (later,) = arm.later_turns
    assert later.figure("vision_ms").samples == ()
    assert len(later.figure("prefill_ms").samples) == 5
