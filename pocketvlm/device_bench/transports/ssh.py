"""A device with an SSH server, reached with the user's own OpenSSH client.

Keys, host keys, jump hosts and aliases are those of the user's configuration; nothing is asked for.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from pocketvlm.device_bench.transports.remote import Link, ShellTransport
from pocketvlm.device_bench.transports.shell import Shell
from pocketvlm.errors import InputError

__all__ = ["SshTransport"]

_ADDRESS = re.compile(
    r"(?P<destination>(?:[\w.][\w.-]*@)?(?:\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[\w.][\w.-]*))(?::(?P<port>\d{1,5}))?",
    re.ASCII,
)
_MOST_PORT = 65535
_OPTIONS = (
    "-T",
    *("-o", "BatchMode=yes"),
    *("-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=5"),
    *("-o", "ServerAliveCountMax=3"),
    *("-o", "LogLevel=ERROR"),
    *("-o", "ControlPersist=no"),
)


@dataclass(frozen=True, kw_only=True)
class SshTransport(ShellTransport):
    """Reaches a device over SSH.

    Attributes:
        destination: `user@host`, or a host that the configuration of SSH knows.
        port: Its port; `None` for what the configuration says.
        client: The command line of the client.
    """

    kind: ClassVar[str] = "ssh"
    destination: str
    port: int | None = None
    client: tuple[str, ...] = ("ssh",)

    @classmethod
    def parse(cls, address: str, runner: Path | None = None) -> Self:
        """Reads `user@host[:port]`.

        Raises:
            InputError: It is none.
        """
        found = _ADDRESS.fullmatch(address)
        port = int(found["port"]) if found and found["port"] else None
        if not found or port == 0 or (port or 0) > _MOST_PORT:
            raise InputError(
                f"device {'ssh:' + address!r}: an address is ssh:user@host or ssh:user@host:port"
            )
        return cls(destination=found["destination"], port=port, runner=runner)

    def link(self) -> Link:
        """One connection for all scripts, where the server allows that."""
        if shutil.which(self.client[0]) is None:
            raise InputError(f"{self.client[0]!r} is not installed here; it is OpenSSH's client")
        port = () if self.port is None else ("-p", str(self.port))
        host = self.destination.replace("[", "").replace("]", "")
        client = (*self.client, *_OPTIONS, *port)
        # One connection carries every script, if the server allows it; if not, each has its own.
        sockets = tempfile.mkdtemp(prefix="pocketvlm-")
        shared = ("-o", f"ControlPath={sockets}/%C", "-o")
        return Link(
            name=f"ssh:{self.destination}" + (f":{self.port}" if self.port else ""),
            shell=Shell(client=(*client, *shared, "ControlMaster=no", "--", host)),
            holder=Shell(client=(*client, *shared, "ControlMaster=yes", "--", host)),
            home="${HOME:?}",
            finish=lambda: shutil.rmtree(sockets, ignore_errors=True),
        )
