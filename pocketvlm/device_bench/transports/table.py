"""Every kind of transport, and what `--device` says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pocketvlm.device_bench.devices import load_device, names_profile
from pocketvlm.device_bench.transports.adb import AdbTransport
from pocketvlm.device_bench.transports.base import Transport
from pocketvlm.device_bench.transports.host import HostTransport
from pocketvlm.device_bench.transports.ios import IosTransport
from pocketvlm.device_bench.transports.simulated import SimulatedTransport
from pocketvlm.device_bench.transports.ssh import SshTransport
from pocketvlm.errors import InputError, UnsupportedError

__all__ = ["TRANSPORTS", "transport_to"]

TRANSPORTS: Mapping[str, Callable[[str, Path | None], Transport]] = {
    HostTransport.kind: HostTransport.parse,
    SshTransport.kind: SshTransport.parse,
    AdbTransport.kind: AdbTransport.parse,
    IosTransport.kind: IosTransport.parse,
    SimulatedTransport.kind: SimulatedTransport.parse,
}
"""What reads an address, by the word that it begins with; what follows the colon is read."""


def transport_to(device: str, runner: Path | None = None) -> Transport:
    """The transport that an address names.

    Args:
        device: `KIND` or `KIND:ADDRESS`, as `host`, `ssh:user@host:port`, `adb`, `adb:SERIAL`,
            `ios:UDID` and `simulated:SCRIPT.yaml`; or a device profile's name.
        runner: The folder of the runner to bring there: what `pack-runner` wrote, or a native one;
            `None` for the one in Python.

    Raises:
        InputError: There is no such kind, address or profile.
        UnsupportedError: A profile of a device is known, and not how to reach it.
    """
    kind, _, address = device.partition(":")
    if kind in TRANSPORTS:
        return TRANSPORTS[kind](address, runner)
    if kind != device or not names_profile(device):
        word = "" if kind == device else f" {kind!r}"
        raise InputError(
            f"device {device!r}:{word} is none of the ways to a device: {', '.join(TRANSPORTS)}"
        )
    profile = load_device(device)
    if profile.transport is None:
        on_apple = any(runtime.name == "coreml" for runtime in profile.runtimes)
        ways = "--device ios:UDID" if on_apple else "--device adb:SERIAL or --device ssh:user@host"
        raise UnsupportedError(
            f"device {device!r}: its profile does not say how it is reached; measure by {ways}, "
            f"with --profile {device}"
        )
    return TRANSPORTS[profile.transport]("", runner)
