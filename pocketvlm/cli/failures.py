"""How a command ends: every failure is one line on stderr and an exit code, whatever it was.

`pocketvlm.errors` holds the failures that are foreseen. Others are the operating system's, which
name a file; lack of memory; a closed pipe; and bugs of this package, which say so and ask to be
reported.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import typer

import pocketvlm
from pocketvlm.cli.console import one_line, say
from pocketvlm.cli.interrupts import announce, is_interrupted
from pocketvlm.errors import InputError, PocketVLMError
from pocketvlm.files.full_disk import describe_fault
from pocketvlm.printable import printable

__all__ = [
    "BROKEN_PIPE",
    "FAULT",
    "WRONG_INPUT",
    "check_arguments",
    "run_to_exit_code",
    "take_traceback_flag",
]

WRONG_INPUT = 2
FAULT = 70
"""EX_SOFTWARE of sysexits.h: a bug in this package."""
BROKEN_PIPE = 141
"""128 + SIGPIPE: the reader of the output stopped reading, as `head` does."""

_FLAG = "--traceback"
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# torch and ONNX Runtime have no error class for lack of memory.
_OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "Failed to allocate memory")


def take_traceback_flag(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Arguments without `--traceback`, which may be anywhere, and whether it was given."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    left = [one for one in arguments[:end] if one != _FLAG]
    asked = len(left) < end or bool(os.environ.get("POCKETVLM_TRACEBACK"))
    return [*left, *arguments[end:]], asked


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuses arguments that are not text, since reports and manifests repeat them.

    Raises:
        InputError: An argument holds bytes that are not UTF-8, or a zero byte.
    """
    for number, argument in enumerate(arguments, start=1):
        if "\0" in argument or any("\ud800" <= character <= "\udfff" for character in argument):
            raise InputError(f"argument {number}: {argument!r} is not UTF-8 text")


def run_to_exit_code(command: Callable[[], object], *, shows_traceback: bool = False) -> int:
    """Runs a command and returns its exit code; never raises.

    Args:
        command: The command; a whole number that it returns is the exit code.
        shows_traceback: Whether a failure is shown with its traceback, before its line.
    """
    _let_every_character_through()
    try:
        code = command()
        _flush_output()
    except BaseException as error:  # noqa: BLE001  (panics of Rust libraries are not an `Exception`)
        if shows_traceback and not isinstance(error, SystemExit | typer.Exit):
            with contextlib.suppress(OSError, ValueError):
                # Messages quote untrusted files; line breaks of the traceback itself stay.
                print(printable("".join(traceback.format_exception(error))), file=sys.stderr)
        code = _end(error)
    _drop_what_cannot_be_written()
    return code if isinstance(code, int) else 0


def _end(error: BaseException) -> int:
    """Prints what failed, in one line; returns the exit code."""
    # Whatever a library turned it into, the signal ended the command.
    if is_interrupted() or isinstance(error, KeyboardInterrupt | typer.Abort):
        return announce()
    if isinstance(error, PocketVLMError):
        return _fail(str(error), error.exit_code)
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else _fail(str(error.code or ""), 1)
    if isinstance(error, typer.TyperException):
        return _fail_usage(error)
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    if isinstance(error, MemoryError) or any(words in _words(error) for words in _OUT_OF_MEMORY):
        return _fail(
            f"not enough memory: {_words(error)}; a smaller model or fewer samples may fit",
            WRONG_INPUT,
        )
    if isinstance(error, OSError):
        return _fail(_describe_system_error(error), WRONG_INPUT)
    full_disk = describe_fault(error)
    if full_disk is not None:
        return _fail(f"{full_disk}; nothing that was there before is lost", WRONG_INPUT)
    return _fail(
        f"this is a bug in pocketvlm: {_words(error)}{_place(error)}; run the same command with "
        f"{_FLAG} and report what it prints",
        FAULT,
    )


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError, ValueError):  # nothing reads stderr: the exit code remains
        say("error: " + one_line(message))
    return code


def _fail_usage(error: typer.TyperException) -> int:
    """Prints a usage error as one line; only a command without arguments shows its help."""
    context = getattr(error, "ctx", None)
    format_message = getattr(error, "format_message", None)
    message = str(error) if format_message is None else format_message()
    if context is not None and message == context.get_help():
        for line in message.splitlines():
            say(line)
        return WRONG_INPUT
    where = f"; see `{context.command_path} --help`" if context is not None else ""
    return _fail(message.rstrip(".") + where, WRONG_INPUT)


def _describe_system_error(error: OSError) -> str:
    names = [
        os.fsdecode(name) if isinstance(name, bytes) else str(name)
        for name in (error.filename, error.filename2)
        if name not in (None, "")
    ]
    where = f"{' -> '.join(names)}: " if names else ""
    text = where + (error.strerror or str(error) or type(error).__name__)
    if error.errno in _FULL_DISK:
        text += "; nothing that was there before is lost"
    return text


def _words(error: BaseException) -> str:
    """The error's class and message; an exception whose text cannot be read still has a class."""
    try:
        text = str(error)
    except Exception as fault:  # noqa: BLE001  (its own `__str__` is a library's code)
        text = f"(its message cannot be read: {type(fault).__name__})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _place(error: BaseException) -> str:
    """Where in this package it was raised: the innermost frame in it."""
    package = Path(pocketvlm.__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(package):
            return f" (at {path.relative_to(package.parent)}:{frame.lineno})"
    return ""


def _let_every_character_through() -> None:
    """Makes terminals show characters outside their encoding as escapes, without raising."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _flush_output() -> None:
    """Flushes the output; a failure fails the command."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        error.filename = error.filename or "standard output"
        raise


def _is_broken(stream: TextIO | None) -> bool:
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        return True
    return False


def _drop_what_cannot_be_written() -> None:
    """Discards buffered output for a closed pipe, which would be a traceback when Python ends."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and _is_broken(stream):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
