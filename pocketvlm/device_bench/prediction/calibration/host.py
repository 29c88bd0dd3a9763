"""Calibrates this machine: what its kernels reach, under which load, and when."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime

from pocketvlm.context import RunContext
from pocketvlm.device_bench.prediction.calibration.host_file import (
    SCHEMA,
    HostCalibration,
    keep_calibration,
    machine_identity,
)
from pocketvlm.device_bench.prediction.calibration.measure import measure_rates

__all__ = ["calibrate_host"]


def calibrate_host(threads: int, ctx: RunContext | None = None) -> HostCalibration:
    """Measures this machine and keeps the result.

    Args:
        threads: Threads of the heavy graphs.
        ctx: Told what is measured next.

    Raises:
        StorageError: The result cannot be written.
    """
    before, start = _load(), time.perf_counter()
    measured = measure_rates(threads, ctx)
    after = _load()
    processor, cores, runtime = machine_identity()
    found = HostCalibration(
        schema=SCHEMA,
        processor=processor,
        cores=cores,
        onnxruntime=runtime,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - start, 1),
        load_average_1m=None if before is None or after is None else (before, after),
        rates=measured.rates,
        probes=measured.probes,
    )
    keep_calibration(found)
    return found


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
