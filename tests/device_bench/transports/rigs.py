"""Devices to reach: an SSH server on loopback, and one that speaks adb's wire protocol."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from pocketvlm.device_bench.transports.adb import AdbTransport
from pocketvlm.device_bench.transports.ssh import SshTransport
from tests.device_bench.transports.adb_device import AdbDevice
from tests.programs import require_program

__all__ = [
    "AdbRig",
    "ShellRig",
    "SshRig",
    "adb",
    "adb_client",
    "adb_server",
    "write_runner",
]

_START_S = 20.0
_DF = """#!/bin/sh
if [ -f "$HOME/free_kb" ]; then
  echo "Filesystem 1024-blocks Used Available Capacity Mounted on"
  echo "/dev/fake 9 9 $(cat "$HOME/free_kb") 99% /a mount"
else
  exec /bin/df "$@"
fi
"""


@dataclass
class ShellRig:
    """A device with a shell, whose files are in a folder here.

    Attributes:
        home: The folder that the transport makes its own in.
    """

    home: Path

    @property
    def base(self) -> Path:
        """The transport's folder."""
        return self.home / ".pocketvlm-bench"

    @property
    def programs(self) -> Path:
        """The folder of programs that the device finds first."""
        return self.home.parent / f"{self.home.name} programs"

    @property
    def environment(self) -> dict[str, str]:
        """What the device's processes inherit."""
        return {"PATH": f"{self.programs}:/usr/bin:/bin", "HOME": str(self.home)}

    def prepare(self) -> None:
        """Makes the device's folders."""
        self.programs.mkdir()
        _write_program(self.programs / "python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        _write_program(self.programs / "df", _DF)

    def empty_home(self) -> None:
        """As a device that nothing was brought to."""
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()

    def set_free_kb(self, free_kb: int) -> None:
        """Says how much space the device has left."""
        (self.home / "free_kb").write_text(str(free_kb))

    def left(self) -> list[str]:
        """What lies in the home."""
        return sorted(path.name for path in self.home.iterdir() if path.name != "free_kb")

    def transport(self, runner: Path | None = None):
        """A transport to it."""
        raise NotImplementedError

    def break_connections(self) -> None:
        """Ends all connections; new ones are accepted."""
        raise NotImplementedError

    def stop(self) -> None:
        """The device is gone."""
        raise NotImplementedError


def _write_program(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


def write_runner(folder: Path, program: str) -> Path:
    """A runner's folder whose runner is this Python program."""
    folder.mkdir()
    (folder / "program.py").write_text(program)
    (folder / "run").write_text('exec python3 program.py "$@"\n')
    return folder


@dataclass
class SshRig(ShellRig):
    """OpenSSH's server on a port of this machine, with throw-away keys."""

    folder: Path
    port: int = 0
    server: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """As the command line has it."""
        return f"ssh:127.0.0.1:{self.port}"

    @property
    def client(self) -> tuple[str, ...]:
        """The real client, with a configuration for this server."""
        return ("ssh", "-F", str(self.folder / "ssh_config"))

    def transport(self, runner: Path | None = None, **options) -> SshTransport:
        return SshTransport(
            destination="127.0.0.1", port=self.port, client=self.client, runner=runner, **options
        )

    def prepare(self) -> None:
        require_program("sshd")
        require_program("ssh")
        super().prepare()
        self.folder.mkdir()
        for name in ("host_key", "user_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name],
                check=True,
            )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        variables = " ".join(f'"{name}={value}"' for name, value in self.environment.items())
        (self.folder / "sshd_config").write_text(
            f"""
ListenAddress 127.0.0.1:{self.port}
HostKey {self.folder}/host_key
AuthorizedKeysFile {self.folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
SetEnv {variables}
"""
        )
        host_key = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {host_key}")
        (self.folder / "ssh_config").write_text(
            f"""
Host *
  IdentityFile {self.folder}/user_key
  IdentitiesOnly yes
  UserKnownHostsFile {self.folder}/known_hosts
  GlobalKnownHostsFile none
  StrictHostKeyChecking yes
"""
        )
        if os.getuid() == 0:  # the server of root keeps a folder for its unprivileged half
            Path("/run/sshd").mkdir(exist_ok=True)

    def start(self) -> None:
        """Empties the home, and starts the server if it does not run."""
        self.empty_home()
        if self.server is None:
            self.server = subprocess.Popen(
                [require_program("sshd"), "-D", "-e", "-f", self.folder / "sshd_config"],
                stderr=subprocess.DEVNULL,
            )
            _wait_for_port(self.port)

    def break_connections(self) -> None:
        assert self.server is not None
        for child in psutil.Process(self.server.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if child.name().startswith("sshd"):
                    child.send_signal(signal.SIGKILL)

    def stop(self) -> None:
        if self.server is not None:
            self.break_connections()
            self.server.kill()
            self.server.wait()
            self.server = None


@dataclass
class AdbRig(ShellRig):
    """A device that the real adb client and server reach over TCP."""

    server_port: int
    device: AdbDevice | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, "TMPDIR": str(self.home)}

    @property
    def serial(self) -> str:
        assert self.device is not None
        return f"127.0.0.1:{self.device.port}"

    @property
    def address(self) -> str:
        return f"adb:{self.serial}"

    def transport(self, runner: Path | None = None, **options) -> AdbTransport:
        return AdbTransport(
            serial=self.serial, client=adb_client(self.server_port), runner=runner, **options
        )

    def start(self) -> None:
        """Empties the home, and connects the device if it is not."""
        self.empty_home()
        if self.device is None:
            self.device = AdbDevice(self.environment)
        adb(self.server_port, "connect", self.serial)
        adb(self.server_port, "-s", self.serial, "wait-for-device")

    def break_connections(self) -> None:
        assert self.device is not None
        self.device.break_connections()

    def stop(self) -> None:
        if self.device is not None:
            self.device.stop()
            adb(self.server_port, "disconnect", self.serial, check=False)
            self.device = None


def adb_client(port: int) -> tuple[str, ...]:
    return ("adb", "-P", str(port))


def adb(port: int, *arguments: str, check: bool = True) -> str:
    """What the real client prints."""
    ended = subprocess.run(
        [*adb_client(port), *arguments],
        capture_output=True,
        text=True,
        timeout=_START_S,
        check=check,
    )
    return ended.stdout


@contextmanager
def adb_server(folder: Path) -> Iterator[int]:
    """The real server, with a home and a port that nobody else has."""
    program = require_program("adb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "ADB_LOCAL_TRANSPORT_MAX_PORT": "5553",  # it looks for no emulators
    }
    server = subprocess.Popen(
        [program, "-P", str(port), "nodaemon", "server"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for_port(port)
        yield port
    finally:
        server.kill()
        server.wait()


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on port {port}")
