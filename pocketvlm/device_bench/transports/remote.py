"""A connection to a device that has a shell, whatever client reaches it.

Everything lies in one folder on the device: the lock, the runner, the bundles and the current job.
It is removed at the end.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.pack.folder import pack_runner
from pocketvlm.device_bench.protocol import Failure, Job, Result, write_job
from pocketvlm.device_bench.transports.base import Connection, Transport
from pocketvlm.device_bench.transports.lock import DeviceLock
from pocketvlm.device_bench.transports.output import (
    EventCallback,
    RunnerOutput,
    ignore_event,
    last_words,
)
from pocketvlm.device_bench.transports.push import PushFile, Room, push_files
from pocketvlm.device_bench.transports.runner_package import runner_command, write_archive
from pocketvlm.device_bench.transports.shell import LostConnectionError, Shell
from pocketvlm.errors import InputError
from pocketvlm.printable import printable_line

__all__ = ["Link", "RemoteConnection", "ShellTransport", "least_graph_bytes", "require_room"]

_FOLDER = ".pocketvlm-bench"
_ARCHIVE = "runner.tar"
_RETRY_S = 1.0
_UNPACK_S = 600.0
_SPARE_BYTES = 2**24
"""Of the disk, for the job and what a runtime writes beside its model."""

_GREET = r"""
cd "{home}" && printf '\nat ' && pwd -P
"""
# A runner with its wheels is installed, from these alone; one that was kept is taken as it is.
_UNPACK = r"""
umask 077
cd "$1" || exit 69
[ -f runner/.sha256 ] && [ "$(cat runner/.sha256)" = "$3" ] && exit 0
rm -rf runner && mkdir runner && tar -xf "$2" -C runner && cd runner || exit 69
command -v "$4" > /dev/null || { echo "it has no $4" >&2; exit 68; }
if [ -d wheels ]; then sh install > install.log 2>&1 || { tail -n 1 install.log >&2; exit 67; } fi
echo "$3" > .sha256
"""
# The input holds the job and then nothing, and it ends with the controller: whatever ends that, or
# the connection, ends the runner and its children.
_RUN = r"""
trap '' HUP
umask 077
base=$1; bytes=$2; shift 2
cd "$base/runner" && head -c "$bytes" > ../job.json || exit 69
exec 3<&0
if command -v setsid > /dev/null 2>&1; then setsid "$@" < ../job.json 3<&- &
else "$@" < ../job.json 3<&- & fi
pid=$!
echo "$pid" > ../runner.pid
( cat <&3; kill -9 "-$pid" || kill -9 "$pid" ) > /dev/null 2>&1 &
watch=$!
wait "$pid"; status=$?
kill "$watch" 2>/dev/null
kill -9 "-$pid" 2>/dev/null
rm -f ../runner.pid ../job.json
exit "$status"
"""
_CLEAN = r"""
cd "$1" && rm -rf runner runner.tar bundles job.json runner.pid
"""


@dataclass(frozen=True, kw_only=True)
class Link:
    """How a device with a shell is reached.

    Attributes:
        name: What it is called in messages.
        shell: Runs scripts there.
        holder: Runs the script that lasts as long as the connection; others may share its way.
        home: The folder there that ours is made in, as its shell writes it.
        revive: Called before the device is tried again; it may do nothing.
        finish: Called when the connection is closed, or was not made.
    """

    name: str
    shell: Shell
    holder: Shell
    home: str
    revive: Callable[[], None] = lambda: None
    finish: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class ShellTransport(Transport):
    """Reaches a device that has a shell.

    Attributes:
        runner: A runner's folder here; `None` for the one in Python, with the device's `python3`.
        keeps_files: Whether runner and bundles stay on the device.
        patience_s: Seconds that a device which went away is waited for.
    """

    runner: Path | None = None
    keeps_files: bool = False
    patience_s: float = 30.0

    @abstractmethod
    def link(self) -> Link:
        """How the device is reached.

        Raises:
            InputError: There is no client, or no such device.
        """

    def connect(self) -> RemoteConnection:
        """Connects, locks the device, and brings the runner."""
        return RemoteConnection(
            self.link(), self.runner, keeps_files=self.keeps_files, patience_s=self.patience_s
        )


class RemoteConnection(Connection):
    """A device that is locked, and has the runner."""

    def __init__(
        self, link: Link, runner: Path | None, *, keeps_files: bool, patience_s: float
    ) -> None:
        """Connects: takes the lock and brings the runner.

        Args:
            link: Reaches the device.
            runner: The runner's folder here; `None` to pack the one in Python.
            keeps_files: Whether runner and bundles stay there, for the next run.
            patience_s: Seconds that the device is waited for where it went away.

        Raises:
            InputError: The device is not reached, is in use, or has no room.
        """
        self._link, self._keeps_files, self._patience_s = link, keeps_files, patience_s
        try:
            self._base = f"{_greet(link)}/{_FOLDER}"
        except BaseException:
            link.finish()
            raise
        self._lock = DeviceLock(link.holder, self._base, link.name)
        self._was_locked = False
        try:
            self._take_lock()
            self._command = self._bring_runner(runner)
        except BaseException:
            self.close()
            raise

    def install(self, bundle: Bundle) -> str:
        """Brings what is missing of a bundle; a part of a file that is there is continued."""
        document = PushFile.of(bundle.path / "manifest.json", "manifest.json")
        signed = (PushFile.of(bundle.path / name, name) for name in bundle.manifest.files)
        folder = f"{self._base}/bundles/{document.sha256[:16]}"
        needed_bytes = least_graph_bytes(bundle)

        def check(room: Room, left_bytes: int) -> None:
            require_room(
                room, left_bytes, needed_bytes, what=str(bundle.path), name=self._link.name
            )

        self._push((*signed, document), folder, check)
        return folder

    def run(
        self, job: Job, *, timeout_s: float, on_event: EventCallback = ignore_event
    ) -> Result | Failure:
        """Runs one job; a connection that was lost before is made again first."""
        output = RunnerOutput(on_event)
        content = write_job(job).encode()
        try:
            self._require_connection()
            status, err = self._link.shell.stream(
                _RUN,
                self._base,
                len(content),
                *self._command,
                feed=(content,),
                on_output=output.feed,
                timeout_s=timeout_s,
                holds_input=True,
            )
        except LostConnectionError as lost:
            self._lock.drop()  # it may not know yet
            return output.failure(f"the connection to {self._link.name} was lost: {lost}")
        except InputError as fault:
            return output.failure(str(fault))
        if status is None:
            return output.failure(f"no result within {timeout_s:g} s")
        return output.outcome(status, err)

    def close(self) -> None:
        """Removes what was put on the device, and frees it; warns if that cannot be done."""
        try:
            if self._was_locked and not self._keeps_files:
                self._require_connection()
                self._clean()
        except (LostConnectionError, InputError) as fault:
            warnings.warn(
                printable_line(f"{self._link.name}: files were left in {self._base}: {fault}"),
                RuntimeWarning,
                stacklevel=2,
            )
        finally:
            self._lock.release()
            self._link.finish()

    def _clean(self) -> None:
        reply = self._link.shell.run(_CLEAN, self._base)
        if reply.status != 0:
            raise InputError(last_words(reply.err).removeprefix(": "))

    def _require_connection(self) -> None:
        if not self._lock.is_held:
            self._take_lock()

    def _take_lock(self) -> None:
        """Takes the lock, and waits for a device that went away.

        Raises:
            InputError: It did not come back, or is in use.
        """
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                self._lock.acquire()
            except LostConnectionError as lost:
                if time.monotonic() >= deadline:
                    raise InputError(
                        f"{self._link.name}: is not reached any more: {lost}"
                    ) from lost
                self._link.revive()
                time.sleep(_RETRY_S)
            else:
                self._was_locked = True
                return

    def _bring_runner(self, runner: Path | None) -> tuple[str, ...]:
        """Brings the runner, and returns the command that starts it in its folder."""
        link = self._link
        with tempfile.TemporaryDirectory() as folder:
            source = runner or pack_runner(Path(folder) / "runner").path
            command = runner_command(source)
            archive = Path(folder) / _ARCHIVE
            write_archive(source, archive)
            file = PushFile.of(archive, _ARCHIVE)

            def check(room: Room, left_bytes: int) -> None:
                unpacked_bytes = left_bytes + file.size_bytes
                require_room(room, unpacked_bytes, 0, what="the runner", name=link.name)

            self._push((file,), self._base, check)
        try:
            reply = link.shell.run(
                _UNPACK, self._base, _ARCHIVE, file.sha256, command[0], timeout_s=_UNPACK_S
            )
        except LostConnectionError as lost:
            raise InputError(f"{link.name}: the connection was lost: {lost}") from lost
        if reply.status != 0:
            raise InputError(f"{link.name}: cannot take the runner{last_words(reply.err)}")
        return command

    def _push(
        self, files: Sequence[PushFile], folder: str, check: Callable[[Room, int], None]
    ) -> None:
        push_files(
            self._link.shell,
            files,
            folder,
            root=self._base,
            name=self._link.name,
            require_room=check,
            reconnect=self._take_lock,
        )


def require_room(
    room: Room, missing_bytes: int, memory_bytes: int, *, what: str, name: str
) -> None:
    """Refuses what does not fit on a device.

    Raises:
        InputError: The disk or the memory is too small.
    """
    what = printable_line(what)
    if room.disk_bytes is not None and missing_bytes + _SPARE_BYTES > room.disk_bytes:
        raise InputError(
            f"{name}: has {room.disk_bytes / 1e6:.0f} MB of free space, and {what} takes "
            f"{missing_bytes / 1e6:.0f} MB and {_SPARE_BYTES / 1e6:.0f} MB to spare"
        )
    if room.memory_bytes is not None and memory_bytes > room.memory_bytes:
        raise InputError(
            f"{name}: has {room.memory_bytes / 1e6:.0f} MB of memory available, and the graphs of "
            f"{what} are {memory_bytes / 1e6:.0f} MB"
        )


def _greet(link: Link) -> str:
    """The folder of the account, as the device calls it."""
    try:
        reply = link.shell.run(_GREET.format(home=link.home))
    except LostConnectionError as lost:
        raise InputError(f"{link.name}: cannot be reached: {lost}") from lost
    _, found, home = reply.out.rpartition(b"\nat ")
    if reply.status != 0 or not found:
        raise InputError(f"{link.name}: has no shell for us{last_words(reply.err)}")
    return os.fsdecode(home.removesuffix(b"\n"))


def least_graph_bytes(bundle: Bundle) -> int:
    """Bytes of the graphs of the target that has the smallest ones."""
    folders: dict[str, set[str]] = {}
    for component in bundle.manifest.components:
        folders.setdefault(component.target, set()).add(component.file.rpartition("/")[0])
    sizes = {name: (bundle.path / name).stat().st_size for name in bundle.manifest.files}
    return min(
        sum(size for name, size in sizes.items() if name.rpartition("/")[0] in places)
        for places in folders.values()
    )
