"""The program that runs on the device: one job in, one document out.

```text
stdin   one JSON document, the job
stdout  any number of lines for people; the last line is one JSON document, the result
stderr  messages of the libraries
```

There are two jobs: `environment` describes the device, `block` measures one bundle. A process does
one job and ends, so that its peak memory is that of one bundle alone, its first answer is cold,
and it cannot affect the next measurement. The protocol does not depend on where the device is: a
transport over ssh or adb starts the same program.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from pocketvlm.child_process import end_with_parent
from pocketvlm.device_bench.bandwidth import last_level_cache_bytes, memory_read_bytes_s
from pocketvlm.device_bench.measure import measure_block
from pocketvlm.device_bench.workload import Workload
from pocketvlm.errors import PocketVLMError
from pocketvlm.json_io import encode
from pocketvlm.machine import describe_environment

__all__ = ["WORKER_SCHEMA", "main", "run_job"]

WORKER_SCHEMA = 1


def run_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Does one job.

    Raises:
        PocketVLMError: The bundle or the workload is invalid.
        ValueError: The job is unknown, or of another protocol.
    """
    if job.get("schema") != WORKER_SCHEMA:
        raise ValueError(f"job schema {job.get('schema')!r}; this worker speaks {WORKER_SCHEMA}")
    threads = job.get("threads") or psutil.cpu_count(logical=False) or os.cpu_count() or 1
    kind = job.get("job")
    if kind == "environment":
        return {**describe_environment(threads), **_conditions(threads)}
    if kind == "block":
        image = job.get("image_base64")
        block = measure_block(
            Path(job["bundle"]),
            Workload.from_json(job["workload"]),
            None if image is None else base64.b64decode(image),
            threads,
        )
        document: dict[str, Any] = encode(block)
        return document
    raise ValueError(f"job {kind!r}; this worker knows environment and block")


def main() -> int:
    """Reads a job, does it, and prints its document as the last line."""
    end_with_parent()
    # Native libraries may write to descriptor 1, which becomes stderr; only the result is written
    # to the real stdout.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        document: dict[str, Any] = {"schema": WORKER_SCHEMA}
        try:
            document |= {"status": "ok", "result": run_job(json.loads(sys.stdin.read()))}
        except PocketVLMError as error:
            document |= {"status": "failed", "reason": str(error)}
        except Exception as error:  # noqa: BLE001  (the host must learn the reason)
            traceback.print_exc()
            document |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(document, allow_nan=False) + "\n")
    return 0 if document["status"] == "ok" else 2


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
    sys.exit(main())
