"""Devices with a shell, each kind in turn, and runners for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pocketvlm.device_bench.pack.folder import pack_runner
from tests.device_bench.transports.rigs import AdbRig, ShellRig, SshRig, adb_server


@pytest.fixture(scope="session")
def adb_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an adb server of our own."""
    with adb_server(tmp_path_factory.mktemp("adb")) as port:
        yield port


@pytest.fixture(scope="session")
def packed_runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runner in Python, as `pack-runner` writes it."""
    return pack_runner(tmp_path_factory.mktemp("runner") / "runner").path


@pytest.fixture(scope="session")
def ssh_device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshRig]:
    """An SSH server; the account's home has a name that no shell takes as it is."""
    folder = tmp_path_factory.mktemp("ssh")
    rig = SshRig(home=folder / "ho me$x'", folder=folder / "keys")
    rig.prepare()
    yield rig
    rig.stop()


@pytest.fixture(scope="session")
def adb_device(tmp_path_factory: pytest.TempPathFactory, adb_port: int) -> Iterator[AdbRig]:
    """A device that adb sees."""
    rig = AdbRig(home=tmp_path_factory.mktemp("adb") / "tmp $x'\"", server_port=adb_port)
    rig.prepare()
    yield rig
    rig.stop()


@pytest.fixture
def ssh(ssh_device: SshRig) -> SshRig:
    """The SSH server, running, with an empty home."""
    ssh_device.start()
    return ssh_device


@pytest.fixture
def android(adb_device: AdbRig) -> AdbRig:
    """The device, connected, with an empty home."""
    adb_device.start()
    return adb_device


@pytest.fixture(params=["ssh", "android"])
def shell_rig(request: pytest.FixtureRequest) -> ShellRig:
    """A device with a shell, each kind in turn."""
    return request.getfixturevalue(request.param)
