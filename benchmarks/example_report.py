"""The report of docs/example_report.html: recipes x targets x models, timed in one interleaved run.

    python benchmarks/example_report.py --work example --out docs/example_report.html

Reference models, so that nothing is downloaded. A run that is in the folder is not repeated. The
measurement is written beside the page, as `bench --out` writes it. After `pocketvlm bench
--calibrate-host --threads 1` it has predictions beside it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from pocketvlm.device_bench.arm import pair_all
from pocketvlm.device_bench.controller.bench import BenchOptions, bench_bundles
from pocketvlm.device_bench.workload import Workload
from pocketvlm.json_io import encode, write_json
from pocketvlm.machine import REPORT_SCHEMA
from pocketvlm.reports.html import render_html
from pocketvlm.reports.report_file import read_report

_ONNX = ("float", "int8-safe", "int4-balanced", "int4-small", "vq-2bit")
_RUNS = (
    *((model, recipe, "onnx") for model in ("pocket-smol", "pocket-llava") for recipe in _ONNX),
    ("pocket-smol", "int8-safe", "executorch"),
    ("pocket-llava", "int4-balanced", "executorch"),
)

# A picture of the models' own size, and a question as people ask it.
_WORKLOAD = Workload(
    name="example", image_size=128, prompt_tokens=48, new_tokens=32, warm_ups=2, answers=4
)


def main() -> None:
    """Compresses what is missing, times everything, writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="Folder of the runs.")
    parser.add_argument("--out", type=Path, required=True, help="The page.")
    parser.add_argument("--n", type=int, default=100, help="Questions that each bundle answers.")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    folders = [
        compress(options.work, *names, n=options.n, threads=options.threads) for names in _RUNS
    ]
    made = [folder for folder in folders if (folder / "report.json").exists()]
    bench = options.work / "bench.json"
    if not bench.exists():
        pairs = pair_all([folder / "bundle" for folder in made])
        (measured,) = bench_bundles(
            pairs, [_WORKLOAD], options=BenchOptions(threads=options.threads)
        )
        write_json(bench, {"schema": REPORT_SCHEMA, "bench": encode(measured)})
    page = render_html(*map(read_report, [*made, bench]))
    options.out.write_text(page, encoding="utf-8")
    shutil.copy(bench, options.out.with_suffix(".json"))
    print(f"{len(made)} bundles, {len(page.encode()) / 1e6:.2f} MB: {options.out}")


def compress(work: Path, model: str, recipe: str, target: str, *, n: int, threads: int) -> Path:
    """One run; a bound of the recipe that is not met is in its report, and on the page."""
    out = work / f"{model}-{recipe}-{target}"
    if not (out / "report.json").exists():
        subprocess.run(
            [
                *(sys.executable, "-m", "pocketvlm", "compress", f"reference:{model}"),
                *("--recipe", recipe, "--target", target, "--out", str(out), "--no-bench"),
                *("--n", str(n), "--threads", str(threads)),
            ],
            check=False,
        )
    return out


if __name__ == "__main__":
    main()
