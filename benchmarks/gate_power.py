"""Whether `pocketvlm compare` tells noise from a runtime that is slower by a tenth.

    python benchmarks/gate_power.py RUN/bundle --work gate --runs 20

Every run is one interleaved measurement of three arms: a bundle, the same bundle again, and the
same in a runtime that waits for a tenth of every step (slowed_runner.py). A run that is in the
folder is not repeated. A bundle against itself should report no difference in at least 19 of 20
runs, and against the slowed one it should in at least 19 of 20. A run takes a minute or two.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

from pocketvlm.device_bench.arm import pair_all
from pocketvlm.device_bench.controller.bench import BenchOptions, bench_bundles
from pocketvlm.device_bench.gate.compare import compare_arms
from pocketvlm.device_bench.transports.host import HostTransport
from pocketvlm.device_bench.workload import Workload
from pocketvlm.json_io import encode, write_json
from pocketvlm.machine import REPORT_SCHEMA
from pocketvlm.reports.report_file import read_report

_RUNNER = (sys.executable, str(Path(__file__).with_name("slowed_runner.py")))
_ARMS = ("reference", "same", "slowed")


def main() -> None:
    """Measures, compares, counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--answers", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    workload = Workload(
        name="gate",
        image_size=128,
        prompt_tokens=48,
        new_tokens=32,
        answers=options.answers,
        repeats=options.repeats,
    )
    folders = [options.work / name for name in _ARMS]
    for folder in folders:
        if not folder.exists():
            shutil.copytree(options.bundle, folder)
    outcomes: dict[str, list[str]] = {"same": [], "slowed": []}
    for number in range(options.runs):
        file = options.work / f"run-{number}.json"
        if not file.exists():
            (measured,) = bench_bundles(
                pair_all(folders),
                [workload],
                transport=HostTransport(command=_RUNNER),
                options=BenchOptions(threads=options.threads),
            )
            write_json(file, {"schema": REPORT_SCHEMA, "bench": encode(measured)})
        for name, verdicts in outcomes.items():
            verdicts.append(judge(file, name))
        print(f"run {number}: {', '.join(f'{name} {seen[-1]}' for name, seen in outcomes.items())}")
    for name, verdicts in outcomes.items():
        seen = sum("regressed" in verdict for verdict in verdicts)
        print(f"reference against {name}: a difference in {seen} of {len(verdicts)} runs")
    print(json.dumps({"benchmark": "gate_power", "verdicts": outcomes}))


def judge(file: Path, name: str) -> str:
    """The verdicts on all figures of one arm, counted."""
    rows = compare_arms(read_report(file), (_ARMS[0], name))
    counts = Counter(row.verdict for row in rows)
    return " ".join(f"{verdict}:{count}" for verdict, count in sorted(counts.items()))


if __name__ == "__main__":
    main()
