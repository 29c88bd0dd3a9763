"""Peak resident memory of the quantizers at a published shape, beside the largest block's bytes.

    python benchmarks/quantization_memory.py --blocks 1

Each method runs in a separate process, reading the model included. The first blocks of tower and
decoder are quantized, and token table, head and projector; all other blocks are walked through and
kept, since a later block takes what the first one takes. Random weights: memory does not depend on
their values. Prints a table and one JSON line; exits with 1 where a peak is more than 2 GB above
the largest block.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from child_process import resident_bytes, run_child

LIMIT_BYTES = 2_000_000_000
METHODS = ("gptq", "vptq", "mixed")


def stages_for(blocks: int, depth: int) -> Mapping[str, Callable[[], Any]]:
    """The stages, which leave blocks from `blocks` on as they are."""
    from pocketvlm.compress.quantization.affine.gptq import Gptq
    from pocketvlm.compress.quantization.affine.rules import WeightRule
    from pocketvlm.compress.quantization.codebook.stage import Codebook, CodebookRule
    from pocketvlm.compress.quantization.mixed.stage import MixedPrecision

    rest = tuple(range(blocks, depth))
    kept = WeightRule(blocks=rest, bits=None)
    table = CodebookRule(part="embedding", index_bits=8, vector_length=2)
    options = (
        CodebookRule(index_bits=8, vector_length=4),
        WeightRule(bits=4, group_size=64),
    )
    return {
        "gptq": lambda: Gptq(rules=(kept, WeightRule(bits=4, group_size=64))),
        "vptq": lambda: Codebook(
            rules=(CodebookRule(blocks=rest, index_bits=None), table, CodebookRule(index_bits=8)),
        ),
        "mixed": lambda: MixedPrecision(
            options=options, average_bits=14.0, pins=(kept,), held_out=0.5, samples=2
        ),
    }


def quantize(model: Path, method: str, blocks: int, samples: int, scratch: Path) -> dict[str, Any]:
    """Loads and quantizes; called in a separate process."""
    from pocketvlm.calibration import CalibrationSet
    from pocketvlm.checkpoint import Checkpoint
    from pocketvlm.context import RunContext
    from pocketvlm.machine import peak_rss_bytes

    started = time.perf_counter()
    checkpoint = Checkpoint.load(model)
    loaded = resident_bytes()
    spec = checkpoint.spec
    depth = max(linear.block for linear in spec.linears() if linear.block is not None) + 1
    sizes = Counter[tuple[str, int | str]]()
    for linear in spec.linears():
        place = linear.name if linear.block is None else linear.block
        sizes[linear.part, place] += checkpoint.form(linear.name).stored_bytes
    stage = stages_for(blocks, depth)[method]()
    calibration = CalibrationSet.from_reference(0, samples)
    done = stage.apply(checkpoint, calibration, RunContext(scratch_dir=scratch))
    return {
        "method": method,
        "layers": sum(row["bits"] is not None for row in done.history[-1].layers),
        "loaded_bytes": loaded,
        "largest_block_bytes": max(sizes.values()),
        "peak_bytes": peak_rss_bytes(),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="A directory; by default the shape below.")
    parser.add_argument("--shape", default="smolvlm-256m")
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    methods = arguments.method or list(METHODS)
    if arguments.child:
        with tempfile.TemporaryDirectory(prefix="pocketvlm-") as scratch:
            row = quantize(
                arguments.model, methods[0], arguments.blocks, arguments.samples, Path(scratch)
            )
        print(json.dumps(row))
        return
    with tempfile.TemporaryDirectory(prefix="pocketvlm-") as folder:
        model = arguments.model
        if model is None:
            from pocketvlm.reference.random_models import write_shape
            from pocketvlm.reference.shapes import load_shape

            model = write_shape(load_shape(arguments.shape), Path(folder) / "model", is_split=False)
        rows = []
        for method in methods:
            options = ["--method", method, "--blocks", str(arguments.blocks)]
            options += ["--samples", str(arguments.samples)]
            rows.append(run_child(__file__, model, options))
    print(
        f"{'method':<7} {'layers':>6} {'loaded MB':>9} {'peak MB':>8} {'above block':>12} {'s':>6}"
    )
    for row in rows:
        above = row["peak_bytes"] - row["largest_block_bytes"]
        print(
            f"{row['method']:<7} {row['layers']:>6} {row['loaded_bytes'] / 1e6:>9.0f} "
            f"{row['peak_bytes'] / 1e6:>8.0f} {above / 1e6:>12.0f} {row['seconds']:>6.0f}"
        )
    print(json.dumps({"benchmark": "quantization_memory", "cpus": os.cpu_count(), "rows": rows}))
    if any(row["peak_bytes"] - row["largest_block_bytes"] > LIMIT_BYTES for row in rows):
        raise SystemExit("a peak is more than 2 GB above the largest block")


if __name__ == "__main__":
    main()
