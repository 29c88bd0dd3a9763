"""Peak resident memory, time and size of `pocketvlm compress` at a published shape.

    python benchmarks/compress_memory.py --recipe int4-small --samples 8

The job runs in a separate process, whose peak is read by the kernel's own accounting. Random
weights: memory, time and bytes do not depend on their values. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def measure(model: str, recipe: str, samples: int, out: Path) -> dict[str, Any]:
    """Runs one job and reads what it cost."""
    command = [
        *(sys.executable, "-m", "pocketvlm", "compress", model, "--recipe", recipe),
        *("--out", str(out), "--no-bench", "--set", f"calibration.samples={samples}", "--json"),
    ]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as stdout:
        process = subprocess.Popen(command, stdout=stdout)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"the job ended with {process.returncode}")
        stdout.seek(0)
        size = json.load(stdout)["size"]
    return {
        "model": model,
        "recipe": recipe,
        "samples": samples,
        "seconds": time.perf_counter() - started,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "source_bytes": size["source_bytes"],
        "bundle_bytes": size["bundle_bytes"],
        "peak_to_source": usage.ru_maxrss * 1024 / size["source_bytes"],
        "bundle_to_source": size["bundle_share"],
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="shape:smolvlm-256m")
    parser.add_argument("--recipe", action="append", required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--keep", type=Path, help="Keep the runs here.")
    arguments = parser.parse_args()
    root = arguments.keep or Path(tempfile.mkdtemp(prefix="pocketvlm-"))
    rows = [
        measure(arguments.model, recipe, arguments.samples, root / recipe)
        for recipe in arguments.recipe
    ]
    if arguments.keep is None:
        shutil.rmtree(root)
    print(f"{'recipe':<16} {'s':>6} {'peak MB':>8} {'/source':>8} {'bundle MB':>10} {'/source':>8}")
    for row in rows:
        print(
            f"{row['recipe']:<16} {row['seconds']:>6.0f} {row['peak_rss_bytes'] / 1e6:>8.0f} "
            f"{row['peak_to_source']:>8.2f} {row['bundle_bytes'] / 1e6:>10.1f} "
            f"{row['bundle_to_source']:>8.3f}"
        )
    print(json.dumps({"benchmark": "compress_memory", "rows": rows}))


if __name__ == "__main__":
    main()
