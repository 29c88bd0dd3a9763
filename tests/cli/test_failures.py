"""Whatever a command ends in: one line, an exit code, and a traceback on request."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from pocketvlm.cli import main
from pocketvlm.cli.failures import check_arguments, run_to_exit_code, take_traceback_flag
from pocketvlm.errors import InputError, ParityError, RecipeError


class UnreadableError(Exception):
    """As ONNX Runtime's own, whose text may hold bytes that are not UTF-8."""

    def __str__(self):
        b"\xff".decode()
        return ""


class PanicException(BaseException):
    """PyO3's name of a Rust panic, which is not an `Exception`."""


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (RecipeError("a.yaml: no\nstages"), 2, "error: a.yaml: no stages"),
        (ParityError("beyond the bound"), 1, "error: beyond the bound"),
        (KeyError("head"), 70, "this is a bug in pocketvlm: KeyError: 'head'"),
        (RecursionError("deep"), 70, "this is a bug in pocketvlm: RecursionError: deep"),
        (EOFError("truncated"), 70, "this is a bug in pocketvlm: EOFError"),
        (UnreadableError(), 70, "UnreadableError: (its message cannot be read"),
        (PanicException("index out of bounds"), 70, "PanicException: index out of bounds"),
        (MemoryError(), 2, "not enough memory: MemoryError"),
        (RuntimeError("can't allocate memory: you tried to allocate 9 bytes"), 2, "not enough mem"),
        (OSError(errno.ENOSPC, "full", "a.bin"), 2, "error: a.bin: full; nothing that was there"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "aa"), 2, "error: aa: File name too"),
        (OSError(errno.EXDEV, "Cross", "a", None, b"b"), 2, "error: a -> b: Cross"),
        (OSError("no number at all"), 2, "error: no number at all"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        (KeyboardInterrupt(), 130, "interrupted"),
        (typer.Exit(3), 3, ""),
        (SystemExit(4), 4, ""),
    ],
)
def test_everything_that_can_be_raised_is_one_line(raised, code, words, capsys):
    def command():
        raise raised

    assert run_to_exit_code(command) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err == "" or err.startswith(("error: ", "interrupted"))
    assert len(err.splitlines()) <= 1
    assert "Traceback" not in err
    assert ("--traceback" in err) == (code == 70)


def test_a_fault_says_where_in_this_package_it_came_from(capsys):
    assert run_to_exit_code(lambda: take_traceback_flag(None)) == 70
    assert "(at pocketvlm/cli/failures.py:" in capsys.readouterr().err


def test_a_line_stays_readable(capsys):
    def command():
        raise RecipeError("x" * 100_000 + " is the end")

    assert run_to_exit_code(command) == 2
    err = capsys.readouterr().err
    assert len(err) < 1500
    assert err.endswith("is the end\n")


def test_the_traceback_is_for_whoever_asks(capsys, monkeypatch):
    def command():
        raise KeyError("head")

    assert run_to_exit_code(command, shows_traceback=True) == 70
    assert "Traceback" in capsys.readouterr().err
    assert take_traceback_flag(["plan", "m", "--traceback"]) == (["plan", "m"], True)
    assert take_traceback_flag(["--traceback", "plan"]) == (["plan"], True)
    assert take_traceback_flag(["plan", "--", "--traceback"]) == (
        ["plan", "--", "--traceback"],
        False,
    )
    monkeypatch.setenv("POCKETVLM_TRACEBACK", "1")
    assert take_traceback_flag(["plan"]) == (["plan"], True)


def test_arguments_are_text():
    check_arguments(["plan", "Modèle ✓", "--set", "a=\n"])
    for bad in (os.fsdecode(b"caf\xe9"), "a\0b", "\ud800"):
        with pytest.raises(InputError, match="argument 2: .* is not UTF-8 text"):
            check_arguments(["plan", bad])


@pytest.mark.parametrize(
    "arguments",
    [
        ["conquer"],
        ["plan"],
        ["plan", "m", "--set"],
        ["plan", "m", "--no-such"],
        ["compress", "m", "--out", ""],
        ["compress", "m", "--out", "-"],
        ["compress", "m", "--out", "o", "--threads", "0"],
        ["compress", "m", "--out", "o", "--threads", "1000000000"],
        ["compress", "m", "--out", "o", "--seed", "-1"],
        ["compress", "m", "--out", "o", "--n", "1000000000000"],
        ["ask", "b", "--prompt", "x", "--max-new-tokens", "nine"],
        ["bench", "b", "--repeats", "1"],
        ["plan", "m" * 5000],
        ["compress", "reference:pocket-llava", "--out", "o/" + "o" * 300],
        ["ask", "b" * 300, "--prompt", "x"],
        ["report", "r" * 300],
    ],
)
def test_arguments_that_cannot_be_meant(arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pocketvlm", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_terminal_of_another_encoding_shows_escapes(monkeypatch):
    for encoding in ("ascii", "latin-1"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        assert run_to_exit_code(lambda: sys.stdout.write("Größe ✓ \udcff") and None) == 0
        text = stream.buffer.getvalue().decode(encoding)
        assert "\\u2713" in text
        assert "\\udcff" in text


def _start(arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-m", "pocketvlm", *arguments],
        stderr=subprocess.PIPE,
        env=environment,
        **options,
    )


def test_nobody_reads_the_output():
    read, write = os.pipe()
    os.close(read)
    child = _start(["devices", "--json"], stdout=write)
    os.close(write)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 141
    assert b"Traceback" not in err
    assert b"Exception" not in err
    assert b"error" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_the_output_cannot_be_written():
    with Path("/dev/full").open("wb") as full:
        child = _start(["devices", "--json"], stdout=full)
        _, err = child.communicate(timeout=120)
    assert child.returncode == 2
    assert b"error: No space left on device" in err
    assert b"Exception" not in err


def test_a_document_is_alone_on_stdout_where_stderr_is_closed():
    command = f"exec 2>&-; {sys.executable} -m pocketvlm devices --json"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        ["sh", "-c", command], stdout=subprocess.PIPE, env=environment, check=False, timeout=120
    )
    assert done.returncode == 0
    json.loads(done.stdout.decode("ascii"))
