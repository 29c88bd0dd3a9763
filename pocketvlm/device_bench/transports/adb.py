"""An Android device, reached with the `adb` client of Android's platform tools.

Files go through the device's shell and not through `adb push`: that removes the part of a file that
had arrived when the connection breaks, and cannot continue it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from pocketvlm.device_bench.transports.remote import Link, ShellTransport
from pocketvlm.device_bench.transports.shell import Shell
from pocketvlm.errors import InputError, UnsupportedError, name_some
from pocketvlm.printable import printable_line

__all__ = ["AdbTransport"]

_ADDRESS = re.compile(r"[\w.\[][\w.:\[\]%-]*", re.ASCII)
_ON_NETWORK = re.compile(r"[^:]+:\d+")
_CLIENT_S = 30.0
_MOST_SHOWN = 8
_UNLOCK = "has not allowed this computer; unlock it and confirm the question about USB debugging"
_STATES = {
    "offline": "does not answer; connect its cable again, or restart it",
    "unauthorized": _UNLOCK,
    "authorizing": _UNLOCK,
    "no permissions": "may not be opened by this user; on Linux, udev rules decide",
}


@dataclass(frozen=True, kw_only=True)
class AdbTransport(ShellTransport):
    """Reaches an Android device by its debug bridge.

    Attributes:
        serial: Which one, as `adb devices` calls it; `None` for the only one.
        client: The command line of the client.
    """

    kind: ClassVar[str] = "adb"
    serial: str | None = None
    client: tuple[str, ...] = ("adb",)

    @classmethod
    def parse(cls, address: str, runner: Path | None = None) -> Self:
        """Reads a serial number, or nothing.

        Raises:
            InputError: It cannot be one.
        """
        if address and not _ADDRESS.fullmatch(address):
            raise InputError(f"device {'adb:' + address!r}: a device is adb, or adb:SERIAL")
        return cls(serial=address or None, runner=runner)

    def link(self) -> Link:
        """Chooses the device."""
        if shutil.which(self.client[0]) is None:
            raise InputError(
                f"{self.client[0]!r} is not installed here; it comes with Android's platform tools"
            )
        serial = self._choose(self._list_devices())
        if "shell_v2" not in self._ask("-s", serial, "features").split():
            raise UnsupportedError(f"adb:{serial}: Android 7 or newer is needed")

        def revive() -> None:
            if _ON_NETWORK.fullmatch(serial):  # the others come back without a request
                with suppress(InputError):
                    self._ask("connect", serial)

        shell = Shell(client=(*self.client, "-s", serial, "shell", "-T"))
        return Link(
            name=f"adb:{serial}",
            shell=shell,
            holder=shell,
            home="${TMPDIR:-/data/local/tmp}",  # Android's shell sets it to the same folder
            revive=revive,
        )

    def _list_devices(self) -> dict[str, str]:
        """States by serial number."""
        rows = self._ask("devices").partition("List of devices attached")[2].splitlines()
        pairs = (row.partition("\t") for row in rows if "\t" in row)
        return {serial: state.strip() for serial, _, state in pairs}

    def _choose(self, states: Mapping[str, str]) -> str:
        known = name_some(
            (f"{serial} ({state})" for serial, state in states.items()), most=_MOST_SHOWN
        )
        if not states:
            wanted = "device 'adb'" if self.serial is None else f"device 'adb:{self.serial}'"
            raise InputError(f"{wanted}: adb sees no device")
        if self.serial is None and len(states) > 1:
            raise InputError(f"device 'adb': there are several, choose by adb:SERIAL: {known}")
        serial = self.serial or next(iter(states))
        if serial not in states:
            raise InputError(f"device 'adb:{serial}': adb does not see it; it sees {known}")
        state = states[serial]
        if state != "device":
            known_state = next((name for name in _STATES if state.startswith(name)), None)
            hint = f": {_STATES[known_state]}" if known_state else ""
            raise InputError(f"device 'adb:{serial}': is {printable_line(state)}{hint}")
        return serial

    def _ask(self, *arguments: str) -> str:
        """What the client prints."""
        try:
            ended = subprocess.run(  # noqa: S603  (the user's own client)
                (*self.client, *arguments),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_CLIENT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(f"adb {arguments[0]}: no answer within {_CLIENT_S:g} s") from error
        out = ended.stdout.decode("utf-8", "replace")
        if ended.returncode != 0:
            words = printable_line(ended.stderr.decode("utf-8", "replace") or out)
            raise InputError(f"adb {' '.join(arguments)}: {words}")
        return out
