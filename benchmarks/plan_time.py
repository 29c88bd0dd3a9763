"""How long `plan shape:NAME --device iphone-17-pro` takes, from its start to its end.

    python benchmarks/plan_time.py
    python benchmarks/plan_time.py --rounds 5 --recipe int4-small

Every shape is planned once per round, one process after the other, with modules compiled before, as
an installed package has them. Prints the median and the longest in wall time and in processor time,
which other work on the machine disturbs less, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from pocketvlm.machine import describe_processor
from pocketvlm.reference.shapes import list_shapes

_DEVICE = "iphone-17-pro"


class Spent(NamedTuple):
    """What a process took, in seconds."""

    wall_s: float
    processor_s: float


def plan(shape: str, recipe: str, compiled: str) -> Spent:
    """Plans a shape in its own process."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-m", "pocketvlm", "plan", f"shape:{shape}", "--recipe", recipe]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [*command, "--device", _DEVICE],
        env=environment,
        capture_output=True,
        check=True,
    )
    wall_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Spent(wall_s, processor_s)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipe", default="int4-balanced")
    arguments = parser.parse_args()
    shapes = list_shapes()
    spent: dict[str, list[Spent]] = {shape: [] for shape in shapes}
    with tempfile.TemporaryDirectory() as compiled:
        plan(shapes[0], arguments.recipe, compiled)
        for _ in range(arguments.rounds):
            for shape in shapes:
                spent[shape].append(plan(shape, arguments.recipe, compiled))
    rows = {
        shape: {
            name: (statistics.median(values), max(values))
            for name, values in zip(Spent._fields, zip(*runs, strict=True), strict=True)
        }
        for shape, runs in spent.items()
    }
    print(f"{'shape':<24} {'wall s':>8} {'longest':>8} {'processor s':>12} {'longest':>8}")
    for shape, row in rows.items():
        (wall, most), (processor, most_processor) = row["wall_s"], row["processor_s"]
        print(f"{shape:<24} {wall:>8.2f} {most:>8.2f} {processor:>12.2f} {most_processor:>8.2f}")
    document = {"benchmark": "plan_time", "recipe": arguments.recipe, "rows": rows}
    print(json.dumps({**document, "processor": describe_processor()}))


if __name__ == "__main__":
    main()
