"""A device serves one controller at a time."""

from __future__ import annotations

import getpass
import os
import select
import socket
import subprocess
import time
from contextlib import ExitStack, suppress

from pocketvlm.child_process import start_child
from pocketvlm.device_bench.transports.shell import LostConnectionError, Shell, write_script
from pocketvlm.errors import InputError
from pocketvlm.printable import printable_line

__all__ = ["DeviceLock"]

_ANSWER_S = 30.0
_RELEASE_S = 10.0
# The script holds the lock while its input is open, so a controller that is killed, or a connection
# that breaks, frees the device. A lock whose process has gone (the device was restarted) is taken,
# and so is this controller's own, which a broken connection may still hold. What the lost process
# was running is ended first; its working folder tells it from a process that got its number later.
_HOLD = r"""
trap '' HUP
umask 077
mkdir -p "$1" && cd "$1" || { echo "refused $1: cannot be written"; exit 0; }
waited=0
until mkdir lock 2>/dev/null; do
  pid=; token=; who=
  [ -f lock/owner ] && read -r pid token who < lock/owner
  if [ -z "$pid" ] && [ "$waited" -lt 2 ]; then waited=$((waited+1)); sleep 1; continue; fi
  if [ -n "$pid" ] && [ "$token" != "$2" ] && kill -0 "$pid" 2>/dev/null; then
    echo "busy $who"; exit 0
  fi
  mv lock "lock.$$" 2>/dev/null && rm -rf "lock.$$"
done
echo "$$ $2 $3" > lock/owner
if [ -f runner.pid ]; then
  read -r pid < runner.pid
  case "$(readlink "/proc/$pid/cwd")" in
    "$1"/*) kill -9 "-$pid" 2>/dev/null || kill -9 "$pid" ;;
  esac
  rm -f runner.pid
fi
echo held
cat > /dev/null
read -r pid token who < lock/owner
[ "$pid" = "$$" ] && rm -rf lock
cd / && rmdir "$1" 2>/dev/null
"""


class DeviceLock:
    """The right to use a folder on a device, held by a process there."""

    def __init__(self, shell: Shell, folder: str, name: str) -> None:
        """The lock is not held yet.

        Args:
            shell: Reaches the device.
            folder: The folder, which is made, and removed after the lock if it is empty.
            name: What the device is called in messages.
        """
        self._shell, self._folder, self._name = shell, folder, name
        self._token = os.urandom(8).hex()
        self._process: subprocess.Popen[str] | None = None
        self._open = ExitStack()

    @property
    def is_held(self) -> bool:
        """Whether the process that holds it is still connected."""
        return self._process is not None and self._process.poll() is None

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            InputError: Another controller has it.
            LostConnectionError: The device does not answer.
        """
        self._open.close()
        process = self._process = self._open.enter_context(
            start_child(
                self._shell.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )
        assert process.stdin is not None  # noqa: S101  (a pipe, above)
        with suppress(BrokenPipeError):
            os.write(process.stdin.fileno(), write_script(_HOLD, self._folder, self._token, _who()))
        answer = _read_answer(process)
        if answer == "held":
            return
        self._open.close()
        word, _, rest = printable_line(answer).partition(" ")
        if word == "busy":
            raise InputError(
                f"{self._name}: is in use by {rest}; one run at a time measures a device "
                f"(its lock is {printable_line(self._folder)}/lock)"
            )
        if word == "refused":
            raise InputError(f"{self._name}: {rest}")
        raise LostConnectionError(f"no answer within {_ANSWER_S:g} s")

    def drop(self) -> None:
        """Lets go of a connection that was lost; the lock must be acquired again."""
        self._process = None
        self._open.close()

    def release(self) -> None:
        """Gives the lock back, if it is held."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_RELEASE_S)
        self._open.close()


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # an account without a name
        user = str(os.getuid())
    return f"{user} on {socket.gethostname()} (process {os.getpid()})"


def _read_answer(process: subprocess.Popen[str]) -> str:
    """The last line before the script waits; what the account prints at login comes before it."""
    assert process.stdout is not None  # noqa: S101  (a pipe)
    deadline, text = time.monotonic() + _ANSWER_S, b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([process.stdout], [], [], left)[0]:
            break
        data = os.read(process.stdout.fileno(), 4096)
        text += data
        *lines, _ = text.split(b"\n")
        for line in lines:
            if line.split(b" ")[0] in (b"held", b"busy", b"refused"):
                return line.decode("utf-8", "replace")
        if not data:
            break
    return ""
