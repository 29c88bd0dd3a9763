"""Runs code that the documentation shows, each piece in a separate process.

The processes are forked from one that has imported what most pieces import, because importing takes
longer than running them.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

__all__ = ["run_snippet"]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
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


def run_snippet(content: str, folder: Path, log: Path) -> str | None:
    """What a piece of code printed if it failed; `None` if it did not.

    Args:
        content: The code.
        folder: Where it runs.
        log: A file for what it prints.
    """
    process = _CONTEXT.Process(target=_run, args=(content, folder, log))
    process.start()
    process.join()
    return log.read_text() if process.exitcode else None


def _run(content: str, folder: Path, log: Path) -> None:
    with log.open("w") as printed:
        for stream in (1, 2):
            os.dup2(printed.fileno(), stream)
    os.chdir(folder)
    sys.path.insert(0, "")
    sys.argv = ["-c"]
    exec(compile(content, "<snippet>", "exec"), {"__name__": "__main__"})  # noqa: S102  (our own pages)
