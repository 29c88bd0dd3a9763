"""An iPhone or iPad, reached with Xcode's `devicectl` from a Mac.

There is no shell: the runner is an app, and bundles are copied into the app's own folder, whose
files `devicectl` cannot be asked to digest. Paths that the app is given are relative to its home. A
launch with a console passes on what the app prints, until it ends.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.protocol import Failure, Job, Result, write_job
from pocketvlm.device_bench.transports.base import Connection, Transport
from pocketvlm.device_bench.transports.output import (
    EventCallback,
    RunnerOutput,
    ignore_event,
    last_words,
)
from pocketvlm.device_bench.transports.process import converse
from pocketvlm.errors import InputError, UnsupportedError

__all__ = ["DeviceCtl", "IosConnection", "IosTransport"]

_APP = "org.pocketvlm.runner"
_ADDRESS = re.compile(r"[0-9A-Fa-f-]{8,64}")
_COPY_S = 3600.0
_ASK_S = 60.0
_FOLDER = "Documents/pocketvlm-bench"


@dataclass(frozen=True, kw_only=True)
class DeviceCtl:
    """The command lines for one device.

    Attributes:
        device: Its identifier.
        app: Identifier of the runner's app.
        client: The command line of the client.
    """

    device: str
    app: str = _APP
    client: tuple[str, ...] = ("xcrun", "devicectl")

    def list_devices(self, answer: Path) -> tuple[str, ...]:
        """Writes all known devices to a file."""
        return (*self.client, "list", "devices", "--quiet", "--json-output", str(answer))

    def install_app(self, app: Path, answer: Path) -> tuple[str, ...]:
        """Installs an app."""
        return (*self._device("install", "app", answer=answer), str(app))

    def copy(
        self, source: Path, destination: str, answer: Path, *, replaces: bool = False
    ) -> tuple[str, ...]:
        """Copies a file, or what is in a folder, into the app's own folder."""
        return (
            *self._device("copy", "to", answer=answer),
            *("--domain-type", "appDataContainer", "--domain-identifier", self.app),
            *(("--remove-existing-content", "true") if replaces else ()),
            *("--source", str(source), "--destination", destination),
        )

    def launch(self, arguments: Sequence[str], answer: Path) -> tuple[str, ...]:
        """Starts the app and passes on what it prints."""
        launch = self._device("process", "launch", answer=answer)
        return (*launch, "--console", "--terminate-existing", self.app, *arguments)

    def _device(self, *words: str, answer: Path) -> tuple[str, ...]:
        options = ("--device", self.device, "--quiet", "--json-output", str(answer))
        return (*self.client, "device", *words, *options)


@dataclass(frozen=True, kw_only=True)
class IosTransport(Transport):
    """Reaches an iPhone or iPad.

    Attributes:
        device: Its UDID or the identifier that Xcode gave it.
        client: The command line of the client.
        app: A built app of the runner, which is installed first; `None` if it is there.
    """

    kind: ClassVar[str] = "ios"
    device: str
    client: tuple[str, ...] = ("xcrun", "devicectl")
    app: Path | None = None

    @classmethod
    def parse(cls, address: str, runner: Path | None = None) -> Self:
        """Reads an identifier.

        Raises:
            InputError: It is none, or the runner is not an app.
        """
        if not _ADDRESS.fullmatch(address):
            raise InputError(f"device {'ios:' + address!r}: a device is ios:UDID")
        if runner is not None and runner.suffix != ".app":
            raise InputError(f"{runner}: a runner for iOS is a built and signed app, NAME.app")
        return cls(device=address, app=runner)

    def connect(self) -> IosConnection:
        """Finds the device, and installs the app if there is one to install."""
        if shutil.which(self.client[0]) is None:
            raise UnsupportedError(
                f"device 'ios:{self.device}': Xcode's devicectl is not here; it needs a Mac with "
                "Xcode 15 or newer"
            )
        control = DeviceCtl(device=self.device, client=self.client)
        connection = IosConnection(control)
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            connection.ask(control.list_devices(answer), _ASK_S)
            self._require_device(answer)
            if self.app is not None:
                connection.ask(control.install_app(self.app, answer), _COPY_S)
        return connection

    def _require_device(self, answer: Path) -> None:
        try:
            devices = json.loads(answer.read_bytes())["result"]["devices"]
            known = {
                name.upper(): str(entry["connectionProperties"].get("tunnelState"))
                for entry in devices
                for name in (entry["identifier"], entry["hardwareProperties"]["udid"])
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
            raise UnsupportedError("devicectl does not list devices as Xcode 15 does") from fault
        if self.device.upper() not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise InputError(f"device 'ios:{self.device}': is not known to Xcode; known: {listed}")
        if known[self.device.upper()] == "unavailable":
            raise InputError(f"device 'ios:{self.device}': is unavailable; unlock and connect it")


class IosConnection(Connection):
    """An app on a device."""

    def __init__(self, control: DeviceCtl) -> None:
        """Nothing was copied yet.

        Args:
            control: Makes command lines for the device.
        """
        self._control = control
        self._has_copied = False

    def install(self, bundle: Bundle) -> str:
        """Copies a bundle into the app's folder, relative to which its place is returned."""
        place = f"{_FOLDER}/{bundle.path.resolve().name}"
        self._copy(bundle.path.resolve(), place)
        return place

    def run(
        self, job: Job, *, timeout_s: float, on_event: EventCallback = ignore_event
    ) -> Result | Failure:
        """Copies the job, launches the app and reads what it prints."""
        output = RunnerOutput(on_event, skips_text=True)
        place = f"{_FOLDER}/job.json"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "job.json"
            file.write_text(write_job(job), encoding="utf-8")
            try:
                self._copy(file, place)
            except InputError as fault:
                return output.failure(str(fault))
            command = self._control.launch(("--job", place), Path(folder) / "answer.json")
            ended = converse(command, (), output.feed, timeout_s=timeout_s)
        if ended.status is None:
            return output.failure(f"no result within {timeout_s:g} s")
        return output.outcome(ended.status, ended.err)

    def close(self) -> None:
        """Replaces what was copied by nothing; warns if that cannot be done."""
        if not self._has_copied:
            return
        try:
            with tempfile.TemporaryDirectory() as empty:
                self._copy(Path(empty), _FOLDER, replaces=True)
        except InputError as fault:
            warnings.warn(f"files were left on the device: {fault}", RuntimeWarning, stacklevel=2)

    def ask(self, command: Sequence[str], timeout_s: float) -> None:
        """Runs a command line to its end.

        Raises:
            InputError: It fails.
        """
        try:
            ended = subprocess.run(  # noqa: S603  (the user's own client)
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"ios:{self._control.device}: no answer within {timeout_s:g} s"
            ) from error
        if ended.returncode != 0:
            words = last_words((ended.stderr or ended.stdout).decode("utf-8", "replace"))
            raise InputError(f"ios:{self._control.device}: devicectl fails{words}")

    def _copy(self, source: Path, place: str, *, replaces: bool = False) -> None:
        self._has_copied = True
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            self.ask(self._control.copy(source, place, answer, replaces=replaces), _COPY_S)
