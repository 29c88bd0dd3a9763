"""Scripts on a device, through a client that passes a command line to a shell there.

The command line is a constant. It reads the script from its standard input, first the number of its
lines and then the lines, and what follows is the script's own input. So neither the client nor the
account's login shell, which may be none of POSIX's, sees a name or any other argument, and a script
may be longer than a command line. Arguments are quoted for POSIX's `sh`, which runs the script.

After the script, its exit status is printed to standard error: that line is missing when the
connection was lost, which no exit status of a client says for certain.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pocketvlm.device_bench.transports.output import last_words
from pocketvlm.device_bench.transports.process import converse

__all__ = ["LostConnectionError", "Reply", "Shell", "write_script"]

# A login shell gets this line: nothing in it has a meaning beyond single quotes in sh, fish or csh.
_RECEIVE = (
    "exec sh -c '"
    'e=$(printf "\\nx"); e=${e%x}; s=; read -r c || exit 70; '
    'while [ "$c" -gt 0 ]; do IFS= read -r l || exit 70; s=$s$l$e; c=$((c-1)); done; '
    '(eval "$s"); printf "\\n#status %s\\n" "$?" >&2'
    "'"
)
_STATUS = re.compile(r"^#status (\d+)$", re.MULTILINE)
_MOST_REPLY_BYTES = 2**26
_OF_A_SIGNAL = 128


class LostConnectionError(Exception):
    """The device is not reached, or not any more; the message has the client's last words."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a script answered.

    Attributes:
        status: Its exit status; negative for the signal that ended it; `None` if it was stopped
            because a limit of time was reached.
        out: Its standard output.
        err: The end of its standard error.
    """

    status: int | None
    out: bytes
    err: str


@dataclass(frozen=True, kw_only=True)
class Shell:
    """Runs scripts on one device.

    Attributes:
        client: The command line of the client, up to the line that the device's shell runs.
    """

    client: tuple[str, ...]

    @property
    def command(self) -> tuple[str, ...]:
        """The command line that runs what `write_script` makes."""
        return (*self.client, _RECEIVE)

    def run(
        self,
        script: str,
        *arguments: str | int,
        feed: Iterable[bytes] = (),
        timeout_s: float = 60.0,
        stall_s: float = float("inf"),
    ) -> Reply:
        """Runs a script and waits for its end.

        Args:
            script: The script; `"$1"` and so on are the arguments.
            arguments: Any text but the null character, file names as Python gives them included.
            feed: What the script reads.
            timeout_s: Seconds until it is stopped.
            stall_s: Seconds without a byte in any direction until it is stopped.

        Raises:
            LostConnectionError: The connection failed before the script had ended.
        """
        out = bytearray()

        def keep(data: bytes) -> None:
            out.extend(data[: _MOST_REPLY_BYTES - len(out)])

        status, err = self.stream(
            script, *arguments, feed=feed, on_output=keep, timeout_s=timeout_s, stall_s=stall_s
        )
        return Reply(status=status, out=bytes(out), err=err)

    def stream(
        self,
        script: str,
        *arguments: str | int,
        on_output: Callable[[bytes], None],
        feed: Iterable[bytes] = (),
        timeout_s: float,
        stall_s: float = float("inf"),
        holds_input: bool = False,
    ) -> tuple[int | None, str]:
        """As `run`, but the output is passed on as it arrives, and the input can stay open.

        Returns:
            Status and the end of its standard error, as in `Reply`.

        Raises:
            LostConnectionError: The connection failed before the script had ended.
        """
        ended = converse(
            self.command,
            _chain(write_script(script, *arguments), feed),
            on_output,
            timeout_s=timeout_s,
            stall_s=stall_s,
            holds_input=holds_input,
        )
        found = _STATUS.findall(ended.err)
        err = _STATUS.sub("", ended.err)
        if ended.stalled:
            raise LostConnectionError(f"nothing moved for {stall_s:g} s{last_words(err)}")
        if ended.status is None:
            return None, err
        if not found:
            words = last_words(err).removeprefix(": ")
            raise LostConnectionError(words or f"the client ended with status {ended.status}")
        status = int(found[-1])
        is_signal = _OF_A_SIGNAL < status <= _OF_A_SIGNAL + max(signal.valid_signals())
        return (_OF_A_SIGNAL - status if is_signal else status), err


def write_script(script: str, *arguments: str | int) -> bytes:
    """What the receiving line reads: the number of lines, and a script that sets its arguments."""
    values = " ".join(_quote(str(argument)) for argument in arguments)
    text = os.fsencode(f"set -- {values}\n{script.strip()}\n")
    return b"%d\n%b" % (text.count(b"\n"), text)


def _quote(text: str) -> str:
    return "'" + text.replace("'", "'\"'\"'") + "'"


def _chain(first: bytes, rest: Iterable[bytes]) -> Iterable[bytes]:
    yield first
    yield from rest
