"""Peak memory, time and size of `pocketvlm compress` at a published shape; what `plan` said of it.

    python benchmarks/compress_memory.py --recipe int4-small --samples 8
    python benchmarks/compress_memory.py --recipe int4-small --model smolvlm-500m --one-tile --bench

The job runs in a separate process, whose peak is read by the kernel's own accounting. Random
weights: memory, time and bytes do not depend on their values. Prints a table and one JSON line.
With `--bench` the bundle is timed as well, as `compress` does it.
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

_PROGRAM = (sys.executable, "-m", "pocketvlm")
_FIGURES = ("ttft_user_ms", "decode_tok_s")


_WRITE = """
import sys
from pathlib import Path
from pocketvlm.reference.random_models import write_shape
from pocketvlm.reference.shapes import load_shape
write_shape(load_shape(sys.argv[1]), Path(sys.argv[2]), is_split=False)
"""


def measure(shape: str, recipe: str, options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Plans and runs one job, and reads what it cost."""
    model, out = f"shape:{shape}", root / f"{shape}-{recipe}"
    if options.one_tile:
        model = str(root / shape)
        subprocess.run([sys.executable, "-c", _WRITE, shape, model], check=True)
    job = [model, "--recipe", recipe, "--json"]
    if options.samples is not None:
        job += ["--set", f"calibration.samples={options.samples}"]
    # In its own process: a child's peak is at least that of the process that starts it.
    planned = subprocess.run([*_PROGRAM, "plan", *job], capture_output=True, check=True)
    command = [*_PROGRAM, "compress", *job, "--out", str(out)]
    command.append("--no-baseline" if options.bench else "--no-bench")
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as stdout:
        process = subprocess.Popen(command, stdout=stdout)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        stdout.seek(0)
        text = stdout.read()
    if not text:
        raise SystemExit(f"the job ended with {process.returncode}")
    report = json.loads(text)
    size = report["size"]
    return {
        "model": shape,
        "one_tile": options.one_tile,
        "recipe": recipe,
        "samples": options.samples,
        "exit_code": process.returncode,
        "seconds": seconds,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "source_bytes": size["source_bytes"],
        "bundle_bytes": size["bundle_bytes"],
        "predicted_bytes": json.loads(planned.stdout)["bundle_bytes"],
        "peak_to_source": usage.ru_maxrss * 1024 / size["source_bytes"],
        "bundle_to_source": size["bundle_share"],
        "latency": report["latency"],
        "environment": report["environment"],
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", action="append", help="A shape. Default: smolvlm-256m.")
    parser.add_argument("--recipe", action="append", required=True)
    parser.add_argument("--samples", type=int, help="Samples to calibrate on, not the recipe's.")
    parser.add_argument(
        "--one-tile", action="store_true", help="Leave pictures whole that the processor would cut."
    )
    parser.add_argument("--bench", action="store_true", help="Time the bundle as well.")
    parser.add_argument("--keep", type=Path, help="Keep the runs here.")
    arguments = parser.parse_args()
    root = arguments.keep or Path(tempfile.mkdtemp(prefix="pocketvlm-"))
    rows = [
        measure(shape, recipe, arguments, root)
        for shape in arguments.model or ["smolvlm-256m"]
        for recipe in arguments.recipe
    ]
    if arguments.keep is None:
        shutil.rmtree(root)
    print(
        f"{'model':<24} {'recipe':<16} {'s':>6} {'peak MB':>8} {'/source':>8} {'bundle MB':>10} "
        f"{'/source':>8} {'/plan':>7}" + "".join(f" {name:>14}" for name in _FIGURES)
    )
    for row in rows:
        print(
            f"{row['model']:<24} {row['recipe']:<16} {row['seconds']:>6.0f} "
            f"{row['peak_rss_bytes'] / 1e6:>8.0f} {row['peak_to_source']:>8.2f} "
            f"{row['bundle_bytes'] / 1e6:>10.1f} {row['bundle_to_source']:>8.3f} "
            f"{row['bundle_bytes'] / row['predicted_bytes']:>7.3f}"
            + "".join(f" {_median(row, name):>14}" for name in _FIGURES)
        )
    print(json.dumps({"benchmark": "compress_memory", "rows": rows}))


def _median(row: dict[str, Any], name: str) -> str:
    """A figure of the first target, where it was measured."""
    for figures in (row["latency"] or {}).values():
        found = (figures or {}).get(name)
        if found is not None:
            return f"{found['median']:.1f}"
    return "-"


if __name__ == "__main__":
    main()
