"""The runner of the line protocol, made slower by a tenth for bundles in a folder named `slowed`.

Every graph that the runtime runs is followed by a busy wait of a tenth of its own time. For
gate_power.py, which asks whether `compare` notices.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pocketvlm.device_bench.protocol import BlockJob
from pocketvlm.device_bench.runner import worker
from pocketvlm.device_bench.runner.measure import measure_block
from pocketvlm.runtime.onnx.runner import OnnxRunner

_SHARE = 0.1
_STEPS = ("encode_image", "embed", "decode")


def main() -> int:
    """Runs one job, like the runner that it wraps."""
    worker.measure_block = measure_slowed  # type: ignore[attr-defined]
    return worker.main(sys.argv[1:])


def measure_slowed(job: BlockJob, *arguments: Any, **options: Any) -> Any:
    """Measures a block, slowed if its bundle's folder says so."""
    if Path(job.bundle).name == "slowed":
        for name in _STEPS:
            setattr(OnnxRunner, name, slow_down(getattr(OnnxRunner, name)))
    return measure_block(job, *arguments, **options)


def slow_down(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, and a busy wait of a tenth of the time that it took."""

    def slowed(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        found = step(*arguments, **options)
        ended = time.perf_counter()
        while time.perf_counter() - ended < _SHARE * (ended - started):
            pass
        return found

    return slowed


if __name__ == "__main__":
    sys.exit(main())
