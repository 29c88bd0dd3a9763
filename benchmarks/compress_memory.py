"""Peak memory, time and size of `pocketvlm compress` at a published shape; what `plan` said of it.

    python benchmarks/compress_memory.py --recipe int4-small --samples 8
    python benchmarks/compress_memory.py --recipe int4-small --model smolvlm-500m --one-tile --bench
    python benchmarks/compress_memory.py --recipe int4-balanced --model qwen3-vl-2b --samples 4 \
        --limit 3.5 --kill

The job runs in a separate process. Its peak is read by the kernel's own accounting, and, ten times
a second, how much of it is anonymous: mapped files count as resident as well, but the system takes
their pages back when memory is short, which `--limit` proves. With `--kill` a second run is killed
when half of the layers are finished, resumed, and compared with the first to the last bit. Random
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory_limit import limited

from pocketvlm.files.reader import file_sha256

_PROGRAM = (sys.executable, "-m", "pocketvlm")
_FIGURES = ("ttft_user_ms", "decode_tok_s")


_WRITE = """
import sys
from pathlib import Path
from pocketvlm.reference.random_models import write_shape
from pocketvlm.reference.shapes import load_shape
write_shape(load_shape(sys.argv[1]), Path(sys.argv[2]), is_split=False)
"""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a process cost."""

    exit_code: int
    stdout: str
    seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int


def run(command: list[str], kill_when: Callable[[], bool] = lambda: False) -> Finished:
    """Runs a command and watches its memory; kills it as soon as it should be."""
    started, anonymous = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as stdout:
        process = subprocess.Popen(command, stdout=stdout)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            anonymous = max(anonymous, _anonymous_bytes(process.pid))
            if kill_when():
                process.kill()
            time.sleep(0.1)
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        return Finished(
            exit_code=process.returncode,
            stdout=stdout.read(),
            seconds=time.perf_counter() - started,
            peak_rss_bytes=usage.ru_maxrss * 1024,
            peak_anonymous_bytes=anonymous,
        )


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


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
    command = [*_PROGRAM, "compress", *job, "--no-baseline" if options.bench else "--no-bench"]
    with limited(None if options.limit is None else int(options.limit * 1e9)) as prefix:
        finished = run([*prefix, *command, "--out", str(out)])
        if not finished.stdout:
            raise SystemExit(f"the job ended with {finished.exit_code}")
        report = json.loads(finished.stdout)
        if options.kill:
            again = out.with_name(out.name + "-killed")
            layers = sum(len(stage["layers"]) for stage in report["stages"])
            killed = run(
                [*prefix, *command, "--out", str(again)],
                lambda: len(list(again.glob(".work/*/layers/*"))) >= layers // 2,
            )
            resumed = run([*prefix, *command, "--out", str(again)])
            print(
                f"{shape} {recipe}: killed with {killed.exit_code} after {killed.seconds:.0f} s, "
            )
            print(f"resumed in {resumed.seconds:.0f} s: {len(_digests(out))} files, ", end="")
            print("same bytes" if _digests(out) == _digests(again) else "OTHER BYTES")
    size, plan = report["size"], json.loads(planned.stdout)
    return {
        "model": shape,
        "one_tile": options.one_tile,
        "recipe": recipe,
        "samples": options.samples,
        "limit_bytes": options.limit and options.limit * 1e9,
        "exit_code": finished.exit_code,
        "seconds": finished.seconds,
        "peak_rss_bytes": finished.peak_rss_bytes,
        "peak_anonymous_bytes": finished.peak_anonymous_bytes,
        "planned_anonymous_bytes": plan["compress_bytes"],
        "source_bytes": size["source_bytes"],
        "bundle_bytes": size["bundle_bytes"],
        "predicted_bytes": plan["bundle_bytes"],
        "stage_seconds": {stage["method"]: stage["seconds"] for stage in report["stages"]},
        "hours_per_billion": _hours_per_billion(report),
        "predicted_stage_seconds": (plan["compress_time"] or {}).get("seconds", {}),
        "peak_to_source": finished.peak_rss_bytes / size["source_bytes"],
        "bundle_to_source": size["bundle_share"],
        "latency": report["latency"],
        "environment": report["environment"],
    }


def _hours_per_billion(report: dict[str, Any]) -> float:
    """What the stages took, for as many weights as the source has."""
    weights = report["size"]["source_weights"]
    return sum(stage["seconds"] for stage in report["stages"]) / 3600 / weights * 1e9


def _digests(out: Path) -> dict[str, str]:
    """Of everything that must not depend on how often a run was started."""
    files = [*(out / "checkpoint").rglob("*"), *(out / "bundle").rglob("*")]
    return {
        file.relative_to(out).as_posix(): file_sha256(file)
        for file in files
        if file.is_file() and file.name not in ("README.md", "report.html")
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
    parser.add_argument("--limit", type=float, help="GB of memory that the job may take.")
    parser.add_argument("--kill", action="store_true", help="Kill a second run, and resume it.")
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
        f"{'model':<24} {'recipe':<16} {'s':>6} {'h/1e9':>6} {'peak MB':>8} {'anon MB':>8} "
        f"{'/plan':>7} {'/source':>8} {'bundle MB':>10} {'/source':>8} {'/plan':>7}"
        + "".join(f" {name:>14}" for name in _FIGURES)
    )
    for row in rows:
        anonymous = row["peak_anonymous_bytes"]
        print(
            f"{row['model']:<24} {row['recipe']:<16} {row['seconds']:>6.0f} "
            f"{row['hours_per_billion']:>6.2f} "
            f"{row['peak_rss_bytes'] / 1e6:>8.0f} {anonymous / 1e6:>8.0f} "
            f"{anonymous / row['planned_anonymous_bytes']:>7.3f} {row['peak_to_source']:>8.2f} "
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
