"""Converts a model in a separate process: `python -m pocketvlm.export.executorch.worker FOLDER`.

A toolkit that runs out of memory or ends its process then takes nothing else with it, and what it
says on the way is collected instead of scattered over a terminal. FOLDER holds `job.pt`; the
program and `result.json` are written beside it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from pocketvlm.child_process import end_process, end_with_parent
from pocketvlm.errors import ExportError, PocketVLMError
from pocketvlm.export.executorch.schema import VisionPart, blank_picture
from pocketvlm.files.full_disk import describe_fault
from pocketvlm.json_io import write_json
from pocketvlm.machine import peak_rss_bytes

__all__ = ["JOB_FILE", "PROGRAM_FILE", "RESULT_FILE", "ConversionJob", "main"]

JOB_FILE = "job.pt"
PROGRAM_FILE = "model.pte"
RESULT_FILE = "result.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class ConversionJob:
    """What is converted.

    Attributes:
        model: The model.
        visions: Its vision methods; the decoder's rows are as the first one's.
        capacity: Rows of KV cache.
        constants: Methods that return a constant, by name.
    """

    model: nn.Module
    visions: tuple[VisionPart, ...]
    capacity: int
    constants: Mapping[str, Any]


_INSTALLED = re.compile(r"\S*/site-packages/")  # where a library lies says nothing of the model


class _Collector(logging.Handler):
    """Keeps what libraries log, and what they warn about."""

    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self.lines: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.add(record.getMessage())

    def add(self, text: str) -> None:
        """Keeps the first line of a message, once."""
        first = text.strip().partition("\n")[0]
        self.lines.setdefault(_INSTALLED.sub("", first))


def main(folder: Path) -> int:
    """Converts the job of a folder; returns the exit code."""
    end_with_parent()
    collector = _Collector()
    logging.getLogger().addHandler(collector)
    result: dict[str, Any]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_, **__: collector.add(str(message))
        try:
            result = _convert(folder)
        except MemoryError:
            result = {"error": "ExportError", "message": "executorch: memory ran out"}
        except PocketVLMError as error:
            result = {"error": type(error).__name__, "message": str(error)}
        except Exception as error:  # noqa: BLE001  (whatever a toolkit raises is the answer of this process)
            first = str(error).strip().partition("\n")[0]
            full_disk = describe_fault(error, folder)
            result = {
                "error": "ExportError" if full_disk is None else "StorageError",
                "message": full_disk or f"executorch: {type(error).__name__}: {first}",
            }
    result["warnings"] = sorted(collector.lines)
    result["peak_rss_bytes"] = peak_rss_bytes()
    write_json(folder / RESULT_FILE, result)
    return 1 if "error" in result else 0


def _convert(folder: Path) -> dict[str, Any]:
    from pocketvlm.export.executorch.writer import lower_program

    _bound_memory()
    # Written by the process that started this one, into a folder that is its own.
    job: ConversionJob = torch.load(folder / JOB_FILE, weights_only=False)
    program = lower_program(
        job.model,
        job.visions,
        capacity=job.capacity,
        constants=job.constants,
        report=_tell,
    )
    (folder / PROGRAM_FILE).write_bytes(program.data)
    _tell("load")
    _require_that_it_runs(folder / PROGRAM_FILE, job)
    return {
        "delegation": {name: found.to_json() for name, found in program.delegation.items()},
        "scale_roundings": dict(program.roundings),
        "dense": list(program.dense),
        "shared_bytes": program.shared_bytes,
    }


def _tell(step: str) -> None:
    print(json.dumps({"step": step}), flush=True)  # noqa: T201  (how the parent hears of progress)


def _bound_memory() -> None:
    """Lets an allocation fail here before the system has to end somebody else."""
    try:
        import resource
    except ImportError:  # no such limit on Windows
        return
    limit = psutil.virtual_memory().available
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _require_that_it_runs(file: Path, job: ConversionJob) -> None:
    """Loads the program as a runtime does, and runs every method.

    Raises:
        ExportError: It does not load, does not run, or returns what is not a number.
    """
    from pocketvlm.runtime.executorch.program import load_program

    module = load_program(file)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    start = torch.zeros(1, dtype=torch.int64)
    try:
        pictures = [
            module.run_method(vision.method, (blank_picture(vision.spec),))[0]
            for vision in job.visions
        ]
        (text,) = module.run_method("token_embedding", (ids,))
        outputs = [
            module.run_method("text_decoder", (pictures[0], start))[0],
            module.run_method("text_decoder", (text, start + pictures[0].shape[1]))[0],
        ]
    except RuntimeError as error:
        raise ExportError(
            f"executorch: the program was written, but does not run: {error}"
        ) from error
    if not all(bool(torch.isfinite(values).all()) for values in (*pictures, text, *outputs)):
        raise ExportError("executorch: the program was written, but returns what is not a number")


if __name__ == "__main__":
    end_process(main(Path(sys.argv[1])))
