"""Several processes that share one run, beside one process: codes, and time.

    python benchmarks/shared_run.py --model reference:pocket-smol --recipe int4-balanced --rounds 3

Each round runs the job once in one process and once by `torchrun`, all with `--threads` threads a
process. Compared are the codes of every layer of the finished checkpoints, scales included; timed
are the stages, whose seconds the first process records. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.pipeline.sources import load_checkpoint


def compress(prefix: list[str], options: argparse.Namespace, out: Path) -> dict[str, float]:
    """Runs the job; returns the seconds of its stages."""
    settings = ["--set", f"calibration.samples={options.samples}"] if options.samples else []
    command = [
        *(sys.executable, *prefix, "-m", "pocketvlm", "compress", options.model),
        *("--recipe", options.recipe, "--out", str(out), "--threads", str(options.threads)),
        *("--no-bench", "--data", "none", "--no-verify-source", *settings),
    ]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    report = json.loads((out / "report.json").read_text())
    return {stage["method"]: stage["seconds"] for stage in report["stages"]}


def other_values(first: Checkpoint, second: Checkpoint) -> tuple[int, int]:
    """How many stored values of two checkpoints differ, and of how many."""
    differing = total = 0
    for linear, form in first.forms().items():
        for name, values in form.to_tensors().items():
            other = second.form(linear.name).to_tensors()[name]
            differing += int((values != other).sum())
            total += values.numel()
    return differing, total


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="reference:pocket-smol")
    parser.add_argument("--recipe", default="int4-balanced")
    parser.add_argument("--samples", type=int, help="Samples to calibrate on, not the recipe's.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="Of each process.")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(options.processes)]
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="pocketvlm-") as name:
        for number in range(options.rounds):
            alone, shared = (Path(name) / f"{kind}-{number}" for kind in ("alone", "shared"))
            seconds = compress([], options, alone), compress(torchrun, options, shared)
            found = (load_checkpoint(out / "checkpoint") for out in (alone, shared))
            differing, total = other_values(*found)
            rounds.append(
                {
                    "alone_s": seconds[0],
                    "shared_s": seconds[1],
                    "differing": differing,
                    "values": total,
                }
            )
    print(f"{'stage':<20} {'alone s':>9} {'shared s':>9} {'ratio':>7}")
    for method in rounds[0]["alone_s"]:
        alone_s, shared_s = (
            statistics.median(each[kind][method] for each in rounds)
            for kind in ("alone_s", "shared_s")
        )
        ratio = statistics.median(
            each["shared_s"][method] / each["alone_s"][method] for each in rounds
        )
        print(f"{method:<20} {alone_s:>9.2f} {shared_s:>9.2f} {ratio:>7.2f}")
    print(f"values that differ: {rounds[-1]['differing']} of {rounds[-1]['values']}")
    print(
        json.dumps(
            {
                "benchmark": "shared_run",
                **vars(options),
                "torch": torch.__version__,
                "rounds": rounds,
            }
        )
    )


if __name__ == "__main__":
    main()
