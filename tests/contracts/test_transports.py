"""What every transport promises; a new one is tested by its line in the table.

Devices: this host, an SSH server on loopback, a device that the real adb client reaches over its
wire protocol, and a script. What only Xcode reaches is tested by its command lines, in
tests/device_bench/transports/test_ios.py.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.block import Block
from pocketvlm.device_bench.protocol import (
    AnswerEvent,
    BlockJob,
    EnvironmentJob,
    Failure,
    LoadedEvent,
)
from pocketvlm.device_bench.transports.base import Transport
from pocketvlm.device_bench.transports.simulated import SimulatedTransport
from pocketvlm.device_bench.transports.table import TRANSPORTS, transport_to
from pocketvlm.device_bench.workload import Workload
from pocketvlm.errors import PocketVLMError
from pocketvlm.json_io import decode
from pocketvlm.reports.measurement import Environment
from tests.device_bench.conftest import tiny_bundle
from tests.device_bench.rig import block_job
from tests.device_bench.transports.conftest import (
    adb_device,
    adb_port,
    android,
    packed_runner,
    ssh,
    ssh_device,
)

__all__ = ["adb_device", "adb_port", "android", "packed_runner", "ssh", "ssh_device", "tiny_bundle"]

NASTY = '-n it\'s $HOME `x`\n"q" é *'
WORKLOAD = Workload(name="t", prompt_tokens=48, new_tokens=3, image_size=64, answers=2)
REACHED_ELSEWHERE = {"ios"}


@dataclass
class Device:
    """A transport to a device, and what is left there."""

    transport: Transport
    left: Callable[[], list[str]]


def host(request: pytest.FixtureRequest) -> Device:
    runner = request.getfixturevalue("packed_runner")
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    request.getfixturevalue("monkeypatch").setenv("PATH", places)  # where the runner finds Python
    return Device(transport_to("host", runner), list)


def over_ssh(request: pytest.FixtureRequest) -> Device:
    rig = request.getfixturevalue("ssh")
    return Device(rig.transport(request.getfixturevalue("packed_runner")), rig.left)


def over_adb(request: pytest.FixtureRequest) -> Device:
    rig = request.getfixturevalue("android")
    return Device(rig.transport(request.getfixturevalue("packed_runner")), rig.left)


def simulated(request: pytest.FixtureRequest) -> Device:
    return Device(SimulatedTransport(), list)


DEVICES = {"host": host, "ssh": over_ssh, "adb": over_adb, "simulated": simulated}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Device:
    """A device of each kind."""
    return DEVICES[request.param](request)


@pytest.fixture
def nasty_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle in a folder whose name no shell takes as it is."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / NASTY))


def test_every_transport_is_tested():
    assert set(DEVICES) | REACHED_ELSEWHERE == set(TRANSPORTS)


def test_a_device_is_described_measured_and_left_as_it_was(device, nasty_bundle):
    heard: list[object] = []
    with device.transport.connect() as connection:
        found = connection.run(EnvironmentJob(threads=1), timeout_s=120)
        assert not isinstance(found, Failure), found.reason
        assert decode(Environment, found).threads == 1
        folder = connection.install(Bundle.open(nasty_bundle))
        job = block_job(nasty_bundle, WORKLOAD)
        job = BlockJob(**{**vars(job), "bundle": folder, "threads": 1})
        outcome = connection.run(job, timeout_s=120, on_event=heard.append)
        assert not isinstance(outcome, Failure), outcome.reason
        block = decode(Block, outcome)
    assert len(block.answers) == 2
    assert all(answer.new_tokens == 3 for answer in block.answers)
    assert len([event for event in heard if isinstance(event, LoadedEvent)]) == 1
    answers = [event for event in heard if isinstance(event, AnswerEvent)]
    assert [event.kind for event in answers] == ["cold", "measured", "measured"]
    assert answers[1].times == block.answers[0]
    assert device.left() == []


def test_a_job_that_cannot_be_done_is_a_failure(device, tmp_path):
    job = BlockJob(bundle=str(tmp_path), runtime="onnx", turns=(), new_tokens=2)
    with device.transport.connect() as connection:
        outcome = connection.run(job, timeout_s=120)
    assert isinstance(outcome, Failure)
    assert outcome.reason
    assert "\n" not in outcome.reason
    assert device.left() == []


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("host:1", "this machine is host, without more"),
        ("ssh:", "an address is ssh:user@host"),
        ("ssh:-oProxyCommand=touch", "an address is ssh:user@host"),
        ("ssh:pi@", "an address is ssh:user@host"),
        ("ssh:a b", "an address is ssh:user@host"),
        ("ssh:pi@board:0", "an address is ssh:user@host"),
        ("ssh:pi@board:65536", "an address is ssh:user@host"),
        ("ssh:$(id)@board", "an address is ssh:user@host"),
        ("ssh:pi@board\n", "an address is ssh:user@host"),
        ("adb:-d", "a device is adb, or adb:SERIAL"),
        ("adb:a b", "a device is adb, or adb:SERIAL"),
        ("ios:", "a device is ios:UDID"),
        ("simulated:", r"simulated:SCRIPT\.yaml"),
        ("simulated:no\nsuch.yaml", "such.yaml"),
        ("usb:1", "'usb' is none of the ways to a device: host, ssh, adb, ios, simulated"),
        ("nokia-3310", "'nokia-3310': is none of the ways to a device: host, ssh, adb, ios, sim"),
        ("no-such/profile.yaml", r"no-such/profile\.yaml"),
        ("galaxy-s25", "does not say how it is reached; measure by --device adb:SERIAL"),
        ("iphone-14", "measure by --device ios:UDID, with --profile iphone-14"),
    ],
)
def test_an_address_that_is_none_is_refused(address: str, reason: str):
    with pytest.raises(PocketVLMError, match=reason) as caught:
        transport_to(address)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("address", "fields"),
    [
        ("ssh:pi", {"destination": "pi", "port": None}),
        ("ssh:pi@board.local:8022", {"destination": "pi@board.local", "port": 8022}),
        ("ssh:u@[fe80::1%eth0]:22", {"destination": "u@[fe80::1%eth0]", "port": 22}),
        ("adb", {"serial": None}),
        ("adb:emulator-5554", {"serial": "emulator-5554"}),
        ("adb:192.168.1.5:5555", {"serial": "192.168.1.5:5555"}),
        ("ios:00008130-001A2B3C4D5E6F70", {"device": "00008130-001A2B3C4D5E6F70"}),
    ],
)
def test_an_address_names_a_device(address: str, fields: dict[str, object]):
    transport = transport_to(address)
    assert transport.kind == address.partition(":")[0]
    assert {name: getattr(transport, name) for name in fields} == fields


@pytest.mark.parametrize("kind", ["host", "ssh:pi", "adb"])
def test_a_folder_that_is_no_runner_is_refused(kind: str, tmp_path: Path):
    def connect():
        transport_to(kind, tmp_path / "none").connect()

    with pytest.raises(PocketVLMError):
        connect()
