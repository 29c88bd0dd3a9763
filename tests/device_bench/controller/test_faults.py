"""Devices that die, vanish, or say what cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pocketvlm.device_bench.arm import pair_all
from pocketvlm.device_bench.controller.bench import BenchInterrupted, bench_bundles
from pocketvlm.device_bench.protocol import AnswerEvent, Failure, LoadedEvent
from pocketvlm.device_bench.transports.simulated import SimulatedTransport
from pocketvlm.device_bench.transports.simulation import Fault, Simulation
from pocketvlm.reports.measurement import ProcessFailure, Prompt
from tests.device_bench.rig import SCRIPTED, ScriptedTransport, bench


def test_what_a_process_measured_before_it_died_stays(tiny_bundle, block):
    (answer,) = block().answers
    told = (
        LoadedEvent(load_ms=70.0),
        AnswerEvent(kind="cold", turn=0, at_ms=300.0, times=block().cold),
        AnswerEvent(kind="measured", turn=0, at_ms=400.0, times=answer),
        AnswerEvent(kind="measured", turn=0, at_ms=500.0, times=answer),
    )
    died = Failure(reason="the connection was lost", events=told)
    workload = replace(SCRIPTED, answers=4)
    whole = replace(block(), answers=(answer,) * 4)
    outcomes = [whole, died, whole, whole, whole]
    result = bench([tiny_bundle], workload, transport=ScriptedTransport(outcomes))
    arm = result.arms["bundle"]
    assert len(arm.latency.figure("ttft_user_ms").samples) == 4 * 4 + 2
    assert 70.0 in arm.latency.figure("load_ms").samples
    lost = ProcessFailure(repeat=1, reason="the connection was lost", answers=2)
    assert arm.failures == (lost,)
    assert "failed: the connection was lost (2 answers are kept)" in result.notes[0]


def test_when_the_device_is_gone_the_run_ends_with_what_there_is(tiny_bundle, other, block):
    transport = ScriptedTransport([block(), block(), Failure(reason="unplugged")], is_gone_after=3)
    results = bench_bundles(
        pair_all([other, tiny_bundle]), [SCRIPTED, SCRIPTED], transport=transport
    )
    assert len(transport.jobs) == 3
    first, second = results
    assert len(first.arms["bundle"].latency.figure("load_ms").samples) == 1
    assert first.notes[0] == "the run ended early: the device is gone: unplugged"
    assert second.arms["bundle"].latency.failed == "it was never run"


def test_an_interrupted_run_has_what_was_measured(tiny_bundle, other, block):
    transport = ScriptedTransport([block(), block(), block(), KeyboardInterrupt()])
    with pytest.raises(BenchInterrupted) as stopped:
        bench_bundles(pair_all([other, tiny_bundle]), [SCRIPTED, SCRIPTED], transport=transport)
    first, second = stopped.value.results
    assert first.notes[0] == "the run ended early: it was interrupted"
    assert len(first.arms["base"].latency.figure("load_ms").samples) == 2
    assert "bundle: 4 of 5 repeats were not run" in first.notes
    assert second.arms["base"].latency.failed == "it was never run"


def test_a_run_that_is_interrupted_before_anything_was_measured_has_no_result(tiny_bundle):
    transport = ScriptedTransport([KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt) as stopped:
        bench([tiny_bundle], transport=transport)
    assert not isinstance(stopped.value, BenchInterrupted)


class RealTime(ScriptedTransport):
    """Its answers arrive at once, so that a long one is seen to be invented."""

    has_real_time = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new_tokens": 458}, "an answer has 458 tokens where 5 were asked for"),
        ({"decode_ms": (2.0, -900.0, 2.0, 2.0)}, "the clock went backwards"),
        ({"ttft_user_ms": 3.0}, "stages before the first token take 72.0 ms"),
        ({"decode_span_ms": 1.0}, "decoding takes 8.0 ms"),
        ({"sample_ms": (0.5,)}, "an answer of 5 tokens has 1, 5, 5 times"),
        ({"vision_ms": None}, "vision_ms is None in a turn with a picture"),
        ({"decode_span_ms": 9e6}, "its answers take 9000.3 s, and the process took"),
    ],
)
def test_a_runner_that_contradicts_itself_has_no_figures(tiny_bundle, block, change, message):
    (answer,) = block().answers
    wrong = replace(block(), answers=(replace(answer, **change),))
    result = bench([tiny_bundle], transport=RealTime([wrong, wrong]))
    arm = result.arms["bundle"]
    assert arm.latency.failed.startswith("the runner contradicts itself: ")
    assert message in arm.latency.failed


def test_more_visual_rows_than_the_prompt_has_are_a_contradiction(tiny_bundle, block):
    wrong = replace(block(), prompt=Prompt(text_tokens=32, visual_tokens=41, tokens=40))
    arm = bench([tiny_bundle], transport=ScriptedTransport([wrong, wrong])).arms["bundle"]
    assert "it counts 41 visual rows in a prompt of 40" in arm.latency.failed


def test_a_clock_that_is_set_while_it_is_read_is_noticed(tiny_bundle, block):
    def run(jump_ms):
        fault = Fault(process=0, kind="clock_jump", after_answers=1, jump_ms=jump_ms)
        transport = SimulatedTransport(simulation=Simulation(faults=(fault,)))
        return bench([tiny_bundle], transport=transport).arms["bundle"]

    assert "the clock was set back by" in run(-5e3).failures[0].reason
    assert "the clock was set forward" in run(3.6e6).failures[0].reason
    assert run(0.0).failures == ()
