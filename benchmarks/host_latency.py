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

from pocketvlm.device_bench.protocol import bench_bundle
from pocketvlm.device_bench.workload import load_workload
from pocketvlm.reports.html import render_html

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
            result = bench_bundle(
                bundle, load_workload(workload), baseline=baseline, threads=options.threads
            )
            page = options.work / f"{options.shape}-{name}-{workload}.html"
            page.write_text(render_html(result), encoding="utf-8")
            results.append({"shape": options.shape, "recipe": name, **result})
            print_result(results[-1])
    print(json.dumps({"benchmark": "host_latency", "results": results}))


def print_result(result: dict[str, Any]) -> None:
    """One block of the table."""
    print(f"\n{result['shape']} {result['recipe']}, workload {result['workload']['name']}")
    print(f"  {'':<16} {'candidate':>12} {'p90':>10} {'float32':>12} {'p90':>10} {'ratio':>7}")
    ours, theirs = result["latency"]["onnx"], result["baseline"]["onnx"]
    for name in SHOWN:
        cells = [
            "-" if block.get(name, {}).get(key) is None else f"{block[name][key]:.1f}"
            for block in (ours, theirs)
            for key in ("median", "p90")
        ]
        ratio = result["ratios"].get(name)
        print(
            f"  {name:<16} {cells[0]:>12} {cells[1]:>10} {cells[2]:>12} {cells[3]:>10} "
            f"{'-' if ratio is None else f'{ratio:.2f}':>7}"
        )
    peaks = (result["memory"], result["memory"]["baseline"])
    megabytes = [f"{(block['peak_rss_bytes'] or 0) / 1e6:.0f}" for block in peaks]
    print(f"  {'peak_rss MB':<16} {megabytes[0]:>12} {'':>10} {megabytes[1]:>12}")
    rate = ours.get("decode_tok_s", {}).get("median")
    if rate:
        read = rate * result["bundles"]["candidate"]["decoder_weight_bytes"] / 1e9
        limit = result["environment"]["memory_read_bytes_s"] / 1e9
        print(
            f"  decode reads {read:.1f} GB/s of weights; a plain reduction reads {limit:.1f} GB/s"
        )
    for note in result["notes"]:
        print(f"  note: {note}")


if __name__ == "__main__":
    main()
