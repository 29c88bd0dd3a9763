"""What it costs to run an ExecuTorch program in a separate process, by call and by token.

    python benchmarks/executorch_process.py BUNDLE [--repeats 300]

The same program is loaded here and in its process, with one thread each, and both take turns. A
token is a call of `token_embedding` and one of `text_decoder`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pocketvlm.bundle import Bundle
from pocketvlm.runtime.executorch.program import find_program, load_program, set_threads
from pocketvlm.runtime.executorch.runner import ExecutorchRunner


def measure(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each way, taken in turns."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 10):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            if turn >= 10:  # the first turns warm up
                samples[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(found) for name, found in samples.items()}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--repeats", type=int, default=300)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    started = time.perf_counter()
    runner = ExecutorchRunner(bundle, threads=1)
    start_s = time.perf_counter() - started
    module = load_program(find_program(bundle))
    set_threads(1)

    def step_here() -> object:
        (rows,) = module.run_method("token_embedding", (torch.tensor([[5]]),), clone_outputs=False)
        return module.run_method("text_decoder", (rows, torch.tensor([0])), clone_outputs=False)

    def step_there() -> object:
        runner.reset()
        return runner.decode(runner.embed([5]), np.array([[0]]))

    ids = [5] * runner.capacity
    there = runner.embed(ids)
    found = {
        "a token": measure({"here": step_here, "in its process": step_there}, arguments.repeats),
        f"{there.nbytes / 1e3:.0f} kB of rows": measure(
            {
                "here": lambda: module.run_method(
                    "token_embedding", (torch.tensor([ids]),), clone_outputs=False
                ),
                "in its process": lambda: runner.embed(ids),
            },
            arguments.repeats,
        ),
    }
    print(f"loaded in its process in {start_s:.2f} s")
    for what, row in found.items():
        both = ", ".join(f"{name} {value:.3f} ms" for name, value in row.items())
        print(f"{what}: {both}: {row['in its process'] - row['here']:.3f} ms more")
    print(json.dumps({"benchmark": "executorch_process", "start_s": start_s, "medians": found}))
    runner.close()


if __name__ == "__main__":
    main()
