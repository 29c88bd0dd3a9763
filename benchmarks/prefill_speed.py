"""How long does a prompt take in the decoder, by its rows and by the kernels of its products?

    python benchmarks/prefill_speed.py --work shapes --threads 1

The decoder of SmolVLM-256M's shape, random weights, takes turns in float32, in int4 by its own
graph alone, and in int4 with the graph for long calls, whose int8 rows are made when the runner
starts. The last row of a prompt, with its logits, is part of every time. Prints medians of
processor time with shares of float32 (a share is the median over rounds), and one JSON line with
every raw sample. Processor time tells the same on a busy machine as long as there is one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from shape_bundles import write_bundle

from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.machine import describe_environment
from pocketvlm.runtime.onnx.runner import OnnxRunner

_SHAPE = "smolvlm-256m"
_ARMS = {
    "float32": ("float", ToOnnx()),
    "int4": ("int4-balanced", ToOnnx()),
    "int4, int8 rows": ("int4-balanced", ToOnnx(int8_prefill_rows=2)),
}
_MANY_ROWS = 256


def open_arm(name: str, work: Path, threads: int) -> OnnxRunner:
    """A runner of one arm's bundle."""
    recipe, target = _ARMS[name]
    label = f"prefill-{recipe}-{target.int8_prefill_rows}"
    bundle = write_bundle(_SHAPE, recipe, work / label, target)
    started = time.process_time()
    runner = OnnxRunner(bundle, threads=threads, capacity=2048, keep_vision=0)
    print(f"{name}: loaded in {time.process_time() - started:.2f} s of processor time")
    return runner


def prompt_ms(runner: OnnxRunner, rows: int) -> tuple[float, float]:
    """One prompt: wall and processor time in milliseconds."""
    ids = np.random.default_rng(0).integers(10, 40_000, rows).tolist()
    runner.reset()
    embeds, positions = runner.embed(ids).copy(), np.arange(rows)[None]
    wall, processor = time.perf_counter(), time.process_time()
    runner.decode(embeds, positions)
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - processor) * 1e3


def main() -> None:
    """Writes the bundles, lets their decoders run in turns, prints medians and shares."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and bundles")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16, 32, 96, 256, 1024])
    options = parser.parse_args()
    load = os.getloadavg()[0]
    runners = {name: open_arm(name, options.work, options.threads) for name in _ARMS}
    samples: dict[int, dict[str, dict[str, list[float]]]] = {}
    for rows in options.rows:
        taken = samples[rows] = {name: {"wall_ms": [], "processor_ms": []} for name in runners}
        for turn in range(options.rounds * (1 if rows > _MANY_ROWS else 3) + 1):
            for name, runner in runners.items():
                wall, processor = prompt_ms(runner, rows)
                if turn:  # the first round warms up
                    taken[name]["wall_ms"].append(wall)
                    taken[name]["processor_ms"].append(processor)
        print(f"{rows:5d} rows: " + "; ".join(_cell(taken, name) for name in runners))
    document: dict[str, Any] = {
        "shape": _SHAPE,
        "environment": describe_environment(options.threads),
        "load": [load, os.getloadavg()[0]],
        "samples": samples,
    }
    print(json.dumps(document))


def _cell(taken: dict[str, dict[str, list[float]]], name: str) -> str:
    mine, theirs = (taken[each]["processor_ms"] for each in (name, "float32"))
    share = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
    return f"{name} {statistics.median(mine):.1f} ms ({share:.2f})"


if __name__ == "__main__":
    main()
