"""The runner of the line protocol in Python, which runs where Python does."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import psutil

from pocketvlm.child_process import end_with_parent
from pocketvlm.device_bench.protocol import (
    EnvironmentJob,
    Event,
    Job,
    Result,
    SensorsJob,
    parse_job,
    write_event,
    write_failure,
    write_result,
)
from pocketvlm.device_bench.runner.measure import measure_block
from pocketvlm.device_bench.runner.sensors.environment import describe_device
from pocketvlm.device_bench.runner.sensors.reading import read_sensors
from pocketvlm.device_bench.transports.base import EventCallback
from pocketvlm.errors import InputError, PocketVLMError
from pocketvlm.files.reader import read_text
from pocketvlm.json_io import encode

__all__ = ["main", "run_job"]


def run_job(job: Job, on_event: EventCallback) -> Result:
    """Does one job.

    Raises:
        PocketVLMError: The bundle or the workload is invalid.
    """
    if isinstance(job, EnvironmentJob):
        return describe_device(job.threads or _default_threads())
    if isinstance(job, SensorsJob):
        reading: Result = encode(read_sensors(0.0))
        return reading
    block = measure_block(job, job.threads or _default_threads(), on_event=on_event)
    document: Result = encode(block)
    return document


def main(arguments: Sequence[str] = ()) -> int:
    """Reads a job, does it, and prints events and its result.

    Args:
        arguments: `--job FILE`, or nothing for a job on standard input.
    """
    end_with_parent()
    # Native libraries may write to descriptor 1, which becomes stderr; only the protocol is written
    # to the real stdout.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def send(event: Event) -> None:
            out.write(write_event(event) + "\n")
            out.flush()

        status = 0
        try:
            last = write_result(run_job(parse_job(_read_job(arguments)), send))
        except PocketVLMError as error:
            last, status = write_failure(str(error)), 2
        except Exception as error:  # noqa: BLE001  (the controller must learn the reason)
            traceback.print_exc()
            last, status = write_failure(f"{type(error).__name__}: {error}"), 2
        out.write(last + "\n")
    return status


def _read_job(arguments: Sequence[str]) -> str:
    """The job's text.

    Raises:
        InputError: There is no such file, or the arguments are others.
    """
    match arguments:
        case []:
            return sys.stdin.read()
        case ["--job", name]:
            return read_text(Path(name), error=InputError)
    raise InputError(f"arguments are {' '.join(arguments)}; allowed: --job FILE, or none")


def _default_threads() -> int:
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
