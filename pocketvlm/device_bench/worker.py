"""The runner of the line protocol in Python, which runs where Python does."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from pocketvlm.child_process import end_with_parent
from pocketvlm.device_bench.bandwidth import last_level_cache_bytes, memory_read_bytes_s
from pocketvlm.device_bench.block import SensorSample
from pocketvlm.device_bench.measure import measure_block
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
from pocketvlm.device_bench.transports.base import EventCallback
from pocketvlm.errors import InputError, PocketVLMError
from pocketvlm.files.reader import read_text
from pocketvlm.json_io import encode
from pocketvlm.machine import describe_environment

__all__ = ["main", "run_job"]


def run_job(job: Job, on_event: EventCallback) -> Result:
    """Does one job.

    Raises:
        PocketVLMError: The bundle or the workload is invalid.
    """
    if isinstance(job, EnvironmentJob):
        threads = job.threads or _default_threads()
        return {**describe_environment(threads), **_conditions(threads)}
    if isinstance(job, SensorsJob):
        reading: Result = encode(SensorSample(at_ms=0.0, temperature_c=_temperature_c()))
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


def _conditions(threads: int) -> dict[str, Any]:
    """Conditions that vary from hour to hour on the same machine."""
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "load_average_1m": round(os.getloadavg()[0], 2),
        "governor": governor.read_text(encoding="utf-8").strip() if governor.exists() else None,
        "temperature_c": _temperature_c(),
        "memory_read_bytes_s": round(memory_read_bytes_s(threads)),
        "last_level_cache_bytes": last_level_cache_bytes(),
    }


def _temperature_c() -> float | None:
    """The temperature of the hottest sensor; `None` if there is none."""
    if not hasattr(psutil, "sensors_temperatures"):  # macOS and Windows
        return None
    sensors = psutil.sensors_temperatures()
    return max((entry.current for entries in sensors.values() for entry in entries), default=None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
