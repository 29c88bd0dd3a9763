"""Which device is chosen, with the real adb client and server."""

from __future__ import annotations

import re
import subprocess
import time

import pytest

from pocketvlm.device_bench.transports.adb import AdbTransport
from pocketvlm.errors import InputError, UnsupportedError
from tests.device_bench.transports.adb_device import AdbDevice
from tests.device_bench.transports.rigs import adb, adb_client


@pytest.fixture
def attach(adb_port):
    """Connects devices in some mood, without a home, and takes them away again."""
    devices: list[AdbDevice] = []
    connecting: list[subprocess.Popen[bytes]] = []

    def attach(**mood) -> str:
        devices.append(AdbDevice({"PATH": "/usr/bin:/bin"}, **mood))
        serial = f"127.0.0.1:{devices[-1].port}"
        command = [*adb_client(adb_port), "connect", serial]
        # The client waits for long, if the device says nothing; the server lists it at once.
        connecting.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        deadline = time.monotonic() + 20
        wanted = "offline" if mood.get("mood") == "silent" else "device|unauthorized|authorizing"
        while not re.search(rf"{serial}\t({wanted})\n", adb(adb_port, "devices")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return serial

    yield attach
    for client in connecting:
        client.kill()
        client.wait()
    for device in devices:
        device.stop()
        adb(adb_port, "disconnect", f"127.0.0.1:{device.port}", check=False)


def refusal(port: int, serial: str | None = None, client: tuple[str, ...] | None = None) -> str:
    transport = AdbTransport(serial=serial, client=client or adb_client(port))
    with pytest.raises((InputError, UnsupportedError)) as caught:
        transport.connect()
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


@pytest.fixture
def nothing_attached(adb_port):
    adb(adb_port, "disconnect")


@pytest.mark.usefixtures("nothing_attached")
def test_no_device(adb_port):
    assert refusal(adb_port) == "device 'adb': adb sees no device"
    assert refusal(adb_port, "R5CT") == "device 'adb:R5CT': adb sees no device"


@pytest.mark.usefixtures("nothing_attached")
def test_two_devices_without_a_choice(adb_port, attach):
    first, second = attach(), attach()
    message = refusal(adb_port)
    assert message.startswith("device 'adb': there are several, choose by adb:SERIAL: ")
    assert f"{first} (device)" in message
    assert f"{second} (device)" in message


def test_a_device_that_is_not_among_them(adb_port, attach):
    serial = attach()
    message = refusal(adb_port, "R5CT")
    assert message.startswith("device 'adb:R5CT': adb does not see it; it sees ")
    assert serial in message


def test_a_device_that_has_not_allowed_this_computer(adb_port, attach):
    serial = attach(mood="unauthorized")
    assert re.search("is (unauthorized|authorizing): .*unlock it", refusal(adb_port, serial))


def test_a_device_that_is_offline(adb_port, attach):
    serial = attach(mood="silent")
    assert re.search("is offline: does not answer", refusal(adb_port, serial))


def test_an_old_device_whose_shell_has_no_exit_status(adb_port, attach):
    serial = attach(features="cmd")
    assert refusal(adb_port, serial) == f"adb:{serial}: Android 7 or newer is needed"


def test_no_client(adb_port):
    message = refusal(adb_port, client=("no-such-adb",))
    assert message == "'no-such-adb' is not installed here; it comes with Android's platform tools"
