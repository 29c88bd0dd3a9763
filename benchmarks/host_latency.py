"""Latency and memory of int4 bundles beside float32 on this host, at a published shape.

    python benchmarks/host_latency.py --workload short vlm --threads 2

Random weights: dense speed does not depend on their values. Every row is one interleaved run of
the protocol of docs/benchmarking.md. Prints a table, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from shape_bundles import write_bundle

from pocketvlm.device_bench.arm import pair_all
from pocketvlm.device_bench.controller.bench import BenchOptions, bench_bundles
from pocketvlm.device_bench.workload import load_workload
from pocketvlm.json_io import encode
from pocketvlm.reports.html import render_html
from pocketvlm.reports.measurement import Environment, Measurement
from pocketvlm.reports.report import Report

_WORK = Path(tempfile.gettempdir()) / "pocketvlm-shapes"
SHOWN = ("vision_ms", "prefill_ms", "ttft_user_ms", "ttft_engine_ms", "decode_tok_s")


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="smolvlm-256m")
    parser.add_argument("--work", type=Path, default=_WORK)
    parser.add_argument("--workload", nargs="+", default=["short", "vlm"])
    parser.add_argument("--recipes", nargs="+", default=["int4-balanced", "int4-small"])
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    baseline = write_bundle(options.shape, "float", options.work / f"{options.shape}-float").path
    results: list[dict[str, Any]] = []
    for name in options.recipes:
        folder = options.work / f"{options.shape}-{name}"
        bundle = write_bundle(options.shape, name, folder).path
        for workload in options.workload:
            (result,) = bench_bundles(
                pair_all([baseline, bundle]),
                [load_workload(workload)],
                options=BenchOptions(threads=options.threads),
            )
            page = options.work / f"{options.shape}-{name}-{workload}.html"
            page.write_text(render_html(Report(bench=result)), encoding="utf-8")
            results.append({"shape": options.shape, "recipe": name, "bench": encode(result)})
            print(f"\n{options.shape} {name}, workload {workload}")
            print_result(result)
    print(json.dumps({"benchmark": "host_latency", "results": results}))


def print_result(result: Measurement) -> None:
    """One block of the table."""
    print(f"  {'':<16} {'candidate':>12} {'p90':>10} {'float32':>12} {'p90':>10} {'ratio':>7}")
    reference, candidate = result.arms.values()
    ours, theirs = candidate.latency, reference.latency
    for name in SHOWN:
        figures = ours.figure(name), theirs.figure(name)
        values = (value for figure in figures for value in (figure.median, figure.p90))
        cells = ["-" if value is None else f"{value:.1f}" for value in values]
        ratio = candidate.ratios.get(name)
        print(
            f"  {name:<16} {cells[0]:>12} {cells[1]:>10} {cells[2]:>12} {cells[3]:>10} "
            f"{'-' if ratio is None else f'{ratio:.2f}':>7}"
        )
    megabytes = [f"{(arm.memory.peak_rss_bytes or 0) / 1e6:.0f}" for arm in (candidate, reference)]
    print(f"  {'peak_rss MB':<16} {megabytes[0]:>12} {'':>10} {megabytes[1]:>12}")
    rate, environment = ours.figure("decode_tok_s").median, result.environment or Environment()
    if rate:
        read = rate * (candidate.bundle.decoder_weight_bytes or 0) / 1e9
        limit = (environment.memory_read_bytes_s or 0) / 1e9
        print(
            f"  decode reads {read:.1f} GB/s of weights; a plain reduction reads {limit:.1f} GB/s"
        )
    for note in result.notes:
        print(f"  note: {note}")


if __name__ == "__main__":
    main()
