"""A child process that is talked to within limits of time and memory, whatever it does."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pocketvlm.child_process import start_child

__all__ = ["Ended", "converse"]

_PIECE_BYTES = 2**16
_MOST_ERR_BYTES = 2**14
_POLL_S = 0.1
# What a process printed before its end is in the pipe. One that it leaves behind, and that keeps
# the pipe open, is not waited for any longer than this.
_DRAIN_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended.

    Attributes:
        status: Its exit status, negative for the signal that ended it; `None` if it was killed here
            because a limit was reached.
        err: The end of its standard error.
        stalled: Whether that limit was the one of a process that neither takes nor gives anything.
    """

    status: int | None
    err: str
    stalled: bool = False


def converse(
    command: Sequence[str],
    feed: Iterable[bytes],
    on_output: Callable[[bytes], None],
    *,
    timeout_s: float,
    stall_s: float = float("inf"),
    holds_input: bool = False,
) -> Ended:
    """Runs a command, writes to it and reads from it; at the end it and its children are gone.

    Times are those of a clock that nobody sets.

    Args:
        command: The command line.
        feed: What it reads, piece by piece.
        on_output: Called with what it prints, as it arrives.
        timeout_s: Seconds until it is killed.
        stall_s: Seconds without a byte in any direction until it is killed.
        holds_input: Whether its standard input stays open until it ends.
    """
    with (
        start_child(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that its children can be ended with it
        ) as process,
        selectors.DefaultSelector() as selector,
    ):
        try:
            return _converse(
                process,
                selector,
                (memoryview(piece) for piece in feed if piece),
                on_output,
                timeout_s=timeout_s,
                stall_s=stall_s,
                holds_input=holds_input,
            )
        finally:
            with suppress(ProcessLookupError, PermissionError):  # macOS: of a group of zombies
                os.killpg(process.pid, signal.SIGKILL)


def _converse(
    process: subprocess.Popen[str],
    selector: selectors.BaseSelector,
    pieces: Iterator[memoryview],
    on_output: Callable[[bytes], None],
    *,
    timeout_s: float,
    stall_s: float,
    holds_input: bool,
) -> Ended:
    stdin, stdout, stderr = process.stdin, process.stdout, process.stderr
    assert stdin is not None  # noqa: S101  (this and the others are pipes)
    assert stdout is not None  # noqa: S101
    assert stderr is not None  # noqa: S101
    for stream, direction in (
        (stdin, selectors.EVENT_WRITE),
        (stdout, selectors.EVENT_READ),
        (stderr, selectors.EVENT_READ),
    ):
        os.set_blocking(stream.fileno(), False)
        selector.register(stream, direction)
    pending, err, outputs = memoryview(b""), bytearray(), 2
    moved = time.monotonic()
    deadline, drained = moved + timeout_s, float("inf")
    while outputs and (now := time.monotonic()) < drained:
        until = min(deadline, moved + stall_s)
        if now >= until:
            return Ended(status=None, err=_text(err), stalled=now < deadline)
        for key, _ in selector.select(min(_POLL_S, until - now)):
            moved = time.monotonic()
            if key.fileobj is stdin:
                pending = pending or next(pieces, pending)
                try:
                    pending = pending[os.write(key.fd, pending[:_PIECE_BYTES]) :]
                    pending = pending or next(pieces, pending)
                except BrokenPipeError:  # its end says more than its closed input
                    pending = memoryview(b"")
                if not pending:
                    selector.unregister(stdin)
                    if not holds_input:
                        stdin.close()
                continue
            data = os.read(key.fd, _PIECE_BYTES)
            if not data:
                selector.unregister(key.fileobj)
                outputs -= 1
            elif key.fileobj is stdout:
                on_output(data)
            else:
                err = (err + data)[-_MOST_ERR_BYTES:]
        if drained == float("inf") and process.poll() is not None:
            drained = time.monotonic() + _DRAIN_S
    try:
        status = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return Ended(status=None, err=_text(err))
    return Ended(status=status, err=_text(err))


def _text(err: bytearray) -> str:
    return err.decode("utf-8", "replace")
