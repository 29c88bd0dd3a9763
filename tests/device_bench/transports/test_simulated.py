"""Devices that a script describes: what goes wrong there is told as by a real one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.block import Block
from pocketvlm.device_bench.protocol import (
    BlockJob,
    EnvironmentJob,
    Failure,
    LoadedEvent,
    SensorsJob,
    Turn,
)
from pocketvlm.device_bench.transports.simulated import SimulatedTransport
from pocketvlm.errors import InputError
from pocketvlm.json_io import decode
from pocketvlm.reports.measurement import Environment


def transport(tmp_path, script: str = "{}") -> SimulatedTransport:
    file = tmp_path / "device.yaml"
    file.write_text(script, encoding="utf-8")
    return SimulatedTransport.parse(str(file))


def job(bundle: str, **changes) -> BlockJob:
    content = {
        "bundle": bundle,
        "runtime": "onnx",
        "turns": (Turn(text="What is it?", pictures=(0,)), Turn(text="And its colour?")),
        "new_tokens": 5,
        "answers": 2,
        "warm_ups": 2,
        **changes,
    }
    return BlockJob(**content)


def run(tmp_path, tiny_bundle, script, processes=1, **changes):
    """The outcomes of some processes, and what was heard of them."""
    heard: list[list] = []
    outcomes = []
    with transport(tmp_path, script).connect() as connection:
        folder = connection.install(Bundle.open(tiny_bundle))
        for _ in range(processes):
            heard.append([])
            outcomes.append(
                connection.run(job(folder, **changes), timeout_s=60, on_event=heard[-1].append)
            )
    return outcomes, heard


def test_an_empty_script_is_a_device(tmp_path, tiny_bundle):
    (outcome,), (heard,) = run(tmp_path, tiny_bundle, "{}")
    block = decode(Block, outcome)
    assert len(block.answers) == 2
    assert [len(turns) for turns in block.later_turns] == [2]
    assert block.cold.ttft_user_ms > 1.2 * block.answers[0].ttft_user_ms
    assert block.answers[0].vision_ms
    assert block.later_turns[0][0].vision_ms is None
    assert block.later_turns[0][0].reused_tokens > 0
    assert isinstance(heard[0], LoadedEvent)
    assert [event.kind for event in heard if hasattr(event, "kind")] == (
        ["cold"] * 2 + ["warm_up"] * 2 + ["measured"] * 4
    )


def test_it_describes_itself_and_reads_its_sensors(tmp_path):
    with transport(tmp_path, "{heat: [{at_s: 0, temperature_c: 31}]}").connect() as connection:
        found = connection.run(EnvironmentJob(threads=None), timeout_s=1)
        sample = connection.run(SensorsJob(), timeout_s=1)
    assert decode(Environment, found).processor == "simulated"
    assert sample["temperature_c"] == 31


def test_a_script_gives_the_same_figures_each_time(tmp_path, tiny_bundle):
    first, second = (run(tmp_path, tiny_bundle, "{noise: 0.1}")[0] for _ in range(2))
    assert first == second


def test_a_device_slows_down_as_it_warms_up(tmp_path, tiny_bundle):
    script = """
noise: 0
heat:
  - {at_s: 0, slower: 1, temperature_c: 30}
  - {at_s: 10, slower: 1, temperature_c: 40}
  - {at_s: 20, slower: 2, temperature_c: 60, thermal_status: 3}
"""
    (outcome,), _ = run(tmp_path, tiny_bundle, script, sustained_s=40.0)
    block = decode(Block, outcome)
    first = [turn for turn in block.sustained if turn.turn == 0]
    assert first[-1].ttft_user_ms == pytest.approx(2 * first[0].ttft_user_ms, rel=1e-6)
    assert 40 <= first[-1].at_s < 42
    assert block.sensors[0].temperature_c < 35 < block.sensors[-1].temperature_c
    assert (block.sensors[0].thermal_status, block.sensors[-1].thermal_status) == (0, 3)


def test_one_bundle_is_slower_than_another(tmp_path, tiny_bundle):
    plain, slower = (
        decode(Block, run(tmp_path, tiny_bundle, f"{{noise: 0, slower: {slower}}}")[0][0])
        for slower in ("{}", f"{{{tiny_bundle.name}: 1.1}}")
    )
    assert slower.load_ms == pytest.approx(1.1 * plain.load_ms)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("disconnect", "the connection to simulated was lost"),
        ("out_of_memory", "SIGKILL; the system does this when memory runs out"),
        ("crash", "the runner was ended by SIGABRT"),
        ("hang", "no result within 60 s"),
    ],
)
def test_what_was_measured_until_a_fault_is_kept(tmp_path, tiny_bundle, fault, reason):
    script = f"faults: [{{process: 1, kind: {fault}, after_answers: 3}}]"
    (before, failure, after), (_, heard, _) = run(tmp_path, tiny_bundle, script, processes=3)
    assert isinstance(failure, Failure)
    assert reason in failure.reason
    assert [event.kind for event in failure.events if hasattr(event, "kind")] == (
        ["cold"] * 2 + ["warm_up"] * 2 + ["measured"] * 2
    )
    assert list(failure.events) == heard
    assert not isinstance(before, Failure)
    assert not isinstance(after, Failure)


def test_a_device_that_vanishes_for_good_fails_every_later_process(tmp_path, tiny_bundle):
    script = "faults: [{process: 0, kind: unreachable}]"
    outcomes, _ = run(tmp_path, tiny_bundle, script, processes=3)
    assert all(isinstance(outcome, Failure) for outcome in outcomes)


def test_garbage_and_a_clock_that_jumps_leave_the_result(tmp_path, tiny_bundle):
    script = r"""
faults:
  - {process: 0, kind: garbage, lines: ["\e[2J", "{", "{\"event\": \"answer\"}", "[1]"]}
  - {process: 0, kind: clock_jump, after_answers: 2, jump_ms: -1e6}
"""
    (outcome,), (heard,) = run(tmp_path, tiny_bundle, script)
    assert len(decode(Block, outcome).answers) == 2
    times = [event.at_ms for event in heard if hasattr(event, "at_ms")]
    assert min(times) < 0 < max(times)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("disk_bytes: 1000000", "simulated: has 1 MB of free space, and"),
        ("memory_bytes: 1000", "simulated: has 0 MB of memory available, and"),
        ("transfer_ends_bytes: 10", "the connection was lost after 10 bytes"),
        ("is_reachable: false", "simulated: cannot be reached"),
    ],
)
def test_a_bundle_that_does_not_get_there_is_refused(tmp_path, tiny_bundle, script, reason):
    with pytest.raises(InputError, match=reason):
        run(tmp_path, tiny_bundle, script)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("[]", "a simulated device is a mapping, not a list"),
        ("beauty: 1", "beauty: unknown key; allowed: processor, cores"),
        ("noise: 2", "noise must be at least 0 and below 1"),
        ("noise: quiet", "noise"),
        ("cores: 1\ncores: 2", "key 'cores' stands twice"),
        ("faults: [{process: 0, kind: rain}]", "faults.0.kind: is \"rain\"; allowed: 'disconnect'"),
        ("heat: [{at_s: 2}, {at_s: 1}]", "in order of time"),
        ("heat: []", "at least one point"),
        ("transfer_bytes_s: 0", "transfer_bytes_s must be above 0"),
        ("{", "is not valid YAML"),
    ],
)
def test_a_script_that_is_none_is_refused_in_one_line(tmp_path, script, reason):
    with pytest.raises(InputError) as caught:
        transport(tmp_path, script)
    assert reason in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_there_must_be_a_script(tmp_path):
    with pytest.raises(InputError, match=r"simulated:SCRIPT\.yaml"):
        SimulatedTransport.parse("")
    with pytest.raises(InputError, match=r"none\.yaml"):
        SimulatedTransport.parse(str(Path(tmp_path) / "none.yaml"))


def test_the_script_of_the_documentation_is_one(tmp_path):
    page = Path(__file__).parents[3] / "docs" / "devices.md"
    block = re.compile(r"^```yml\n(.*?)^```", re.MULTILINE | re.DOTALL)
    (script,) = block.findall(page.read_text(encoding="utf-8"))
    simulation = transport(tmp_path, script).simulation
    assert simulation.processor == "imagined phone"
    assert simulation.heat_at(30).slower == pytest.approx(1.3)
