"""Separate processes that begin with the libraries imported, which takes longer than what they do.

They are forked from one that has imported what most of them import. What a process looks like from
outside is `python -m pocketvlm`, or `python -c`; where the start itself is tested, tests start
that.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["FORKED", "fork_cli", "fork_snippet"]

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "pocketvlm.evaluation.score",
        "pocketvlm.export.onnx.target",
        "pocketvlm.pipeline.run",
        "pocketvlm.recipes.load",
        "pocketvlm.runtime.conversation",
        "pocketvlm.runtime.onnx.runner",
        "transformers.models.auto.processing_auto",
        "transformers.models.auto.modeling_auto",
        "transformers.modeling_utils",
        "transformers.processing_utils",
        __name__,
    ]
)


def fork_snippet(content: str, folder: Path) -> str | None:
    """What a piece of code printed if it failed; `None` if it did not.

    Args:
        content: The code.
        folder: Where it runs.
    """
    done = _run(_run_code, content, folder)
    return done.stdout + done.stderr if done.returncode else None


def fork_cli(
    *arguments: object, check: int | None = None, largest_file: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command line.

    Args:
        *arguments: Its words.
        check: The exit code that it must have.
        largest_file: Bytes that it may write to a file, as on a disk that is full after them.
    """
    done = _run(_run_module, tuple(map(str, arguments)), largest_file)
    if check is not None:
        assert done.returncode == check, done.stderr
    return done


def _run(target: Callable[..., None], *values: Any) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "stdout", Path(folder) / "stderr"]
        process = FORKED.Process(target=_begin, args=(files, dict(os.environ), target, values))
        process.start()
        process.join()
        out, err = (file.read_text() if file.exists() else "" for file in files)
    return subprocess.CompletedProcess([target.__name__], process.exitcode or 0, out, err)


def _begin(
    files: list[Path], environment: dict[str, str], target: Callable[..., None], values: Any
) -> None:
    for stream, file in enumerate(files, start=1):
        with file.open("w") as printed:
            os.dup2(printed.fileno(), stream)
    # The process that it is forked from has the environment of when it began.
    os.environ.clear()
    os.environ.update(environment)
    target(*values)


def _run_code(content: str, folder: Path) -> None:
    os.chdir(folder)
    sys.path.insert(0, "")
    sys.argv = ["-c"]
    exec(compile(content, "<snippet>", "exec"), {"__name__": "__main__"})  # noqa: S102  (our own pages)


def _run_module(arguments: tuple[str, ...], largest_file: int | None) -> None:
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["pocketvlm", *arguments]
    runpy.run_module("pocketvlm", run_name="__main__", alter_sys=True)
