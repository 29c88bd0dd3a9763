"""Peak resident memory of GBLM's gradients, and of the whole stage, above the loaded model.

    python benchmarks/gblm_memory.py --samples 4

Each kind of gradient runs in a separate process: the model is loaded, then the kernel's record of
the peak is reset. Random weights: memory does not depend on their values. Prints a table and one
JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from child_process import resident_bytes, run_child

LIMIT = 4.0  # bytes a parameter above the loaded model


def prune(
    model: Path, gradient: Literal["answer", "block"], samples: int, scratch: Path
) -> dict[str, Any]:
    """Loads, prunes, and reads what either took; called in a separate process."""
    from pocketvlm.calibration import CalibrationSet
    from pocketvlm.checkpoint import Checkpoint
    from pocketvlm.compress.pruning.unstructured.gblm import Gblm
    from pocketvlm.compress.pruning.unstructured.pruner import Prune
    from pocketvlm.context import RunContext
    from pocketvlm.machine import peak_rss_bytes

    ctx = RunContext(scratch_dir=scratch)
    calibration = CalibrationSet.synthetic(samples)
    checkpoint = Checkpoint.load(model)
    loaded = resident_bytes()
    # What torch and the image library keep after their first run does not belong to a gradient, but
    # not to the loaded model either: it counts.
    peaks: dict[str, int] = {}
    seconds: dict[str, float] = {}
    stage = Prune(score=Gblm(gradient=gradient), held_out=0.0)
    started = time.perf_counter()
    _forget_peak()

    def on_progress(progress: Any) -> None:
        if progress.task == "gradients":
            peaks["gradients"] = peak_rss_bytes()
            seconds["gradients"] = time.perf_counter() - started

    pruned = stage.apply(checkpoint, calibration, replace(ctx, on_progress=on_progress))
    peaks["stage"] = peak_rss_bytes()
    seconds["stage"] = time.perf_counter() - started
    spec = pruned.spec
    linears = sum(one.out_features * one.in_features for one in spec.linears())
    vectors = sum(value.numel() for value in pruned.model.parameters())
    return {
        "gradient": gradient,
        "samples": samples,
        "parameters": linears + vectors,
        "loaded_bytes": loaded,
        "peak_bytes": peaks,
        "seconds": seconds,
        "bytes_a_parameter": {
            name: (peak - loaded) / (linears + vectors) for name, peak in peaks.items()
        },
        "scratch_bytes": sum(f.stat().st_size for f in (scratch / "gradients").iterdir()),
    }


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="A directory; by default the shape below.")
    parser.add_argument("--shape", default="smolvlm-256m")
    parser.add_argument("--gradient", action="append", choices=("answer", "block"))
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    kinds = arguments.gradient or ["answer", "block"]
    if arguments.child:
        with tempfile.TemporaryDirectory(prefix="pocketvlm-") as scratch:
            row = prune(arguments.model, kinds[0], arguments.samples, Path(scratch))
        print(json.dumps(row))
        return
    with tempfile.TemporaryDirectory(prefix="pocketvlm-") as folder:
        model = arguments.model
        if model is None:
            from pocketvlm.reference.random_models import write_shape
            from pocketvlm.reference.shapes import load_shape

            model = write_shape(load_shape(arguments.shape), Path(folder) / "model", is_split=False)
        rows = []
        for kind in kinds:
            options = ["--gradient", kind, "--samples", str(arguments.samples)]
            rows.append(run_child(__file__, model, options))
    print(
        f"{'gradient':<9} {'loaded MB':>9} {'peak MB':>8} {'B/param':>8} {'stage MB':>9} "
        f"{'B/param':>8} {'disk MB':>8} {'s':>6} {'stage s':>8}"
    )
    for row in rows:
        peak, above, seconds = row["peak_bytes"], row["bytes_a_parameter"], row["seconds"]
        print(
            f"{row['gradient']:<9} {row['loaded_bytes'] / 1e6:>9.0f} "
            f"{peak['gradients'] / 1e6:>8.0f} {above['gradients']:>8.2f} "
            f"{peak['stage'] / 1e6:>9.0f} {above['stage']:>8.2f} "
            f"{row['scratch_bytes'] / 1e6:>8.0f} {seconds['gradients']:>6.0f} "
            f"{seconds['stage']:>8.0f}"
        )
    print(json.dumps({"benchmark": "gblm_memory", "cpus": os.cpu_count(), "rows": rows}))
    worst = max(max(row["bytes_a_parameter"].values()) for row in rows)
    if worst > LIMIT:
        raise SystemExit(f"{worst:.2f} bytes a parameter above the loaded model, not {LIMIT:g}")


if __name__ == "__main__":
    main()
