"""What is left of this host's speed after ten minutes of answers without a pause?

    python benchmarks/sustained.py --seconds 600 --out sustained.jsonl

One process, one bundle of random weights at a published shape (dense speed does not depend on their
values), one picture and one question per answer. Prints the speed of the first and of the last
tenth of the time and what is retained; every answer and every sample of the sensors is kept in
`--out`, one event per line. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from base64 import b64encode
from pathlib import Path

from shape_bundles import write_bundle

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.controller.prompts import fit_turns
from pocketvlm.device_bench.controller.shown import show_pictures
from pocketvlm.device_bench.figures.sustained import summarise_sustained
from pocketvlm.device_bench.protocol import BlockJob, Event, write_event
from pocketvlm.device_bench.runner.measure import measure_block
from pocketvlm.device_bench.runner.sensors.environment import describe_device
from pocketvlm.device_bench.workload import Workload
from pocketvlm.json_io import encode
from pocketvlm.reports.measurement import Retention

_WORK = Path(tempfile.gettempdir()) / "pocketvlm-shapes"


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bundle", type=Path, help="instead of a shape and a recipe")
    parser.add_argument("--shape", default="smolvlm-256m")
    parser.add_argument("--recipe", default="int4-balanced")
    parser.add_argument("--work", type=Path, default=_WORK)
    parser.add_argument("--runtime", default="onnx")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("sustained.jsonl"))
    options = parser.parse_args()
    folder = options.bundle
    if folder is None:
        target = options.work / f"{options.shape}-{options.recipe}"
        folder = write_bundle(options.shape, options.recipe, target).path
    workload = Workload(name="sustained", image_size=512, prompt_tokens=32, new_tokens=32)
    pictures, bundle = workload.encoded_pictures(), Bundle.open(folder)
    job = BlockJob(
        bundle=str(folder),
        runtime=options.runtime,
        turns=fit_turns(bundle, workload, show_pictures(bundle, pictures, workload.vision)),
        new_tokens=workload.new_tokens,
        pictures=tuple(b64encode(picture).decode() for picture in pictures),
        sustained_s=options.seconds,
    )
    environment = describe_device(options.threads)
    with options.out.open("w", encoding="utf-8") as out:

        def keep(event: Event) -> None:
            out.write(write_event(event) + "\n")

        block = measure_block(job, options.threads, on_event=keep)
    found = summarise_sustained(block)
    if found is None:
        raise SystemExit("no answer was complete")
    print(f"{found.answers} answers in {found.duration_s:.0f} s; {environment['processor']}")
    print(f"  {'':<14} {'burst':>9} {'last':>9} {'retained':>9}")
    print_retention("decode_tok_s", found.decode_tok_s)
    print_retention("ttft_user_ms", found.ttft_user_ms)
    for status, seconds in found.time_to_status_s.items():
        print(f"  {status} after {seconds:.0f} s")
    if not any(sample.thermal_status for sample in block.sensors):
        print("  no thermal state above none was seen")
    print(
        json.dumps(
            {
                "benchmark": "sustained",
                "bundle": folder.name,
                "runtime": options.runtime,
                "threads": options.threads,
                "sustained": encode(found),
                "memory": encode(block.memory),
                "energy": encode(block.energy),
                "environment": environment,
            }
        )
    )


def print_retention(name: str, found: Retention) -> None:
    """One row of the table."""
    cells = (found.burst, found.last, found.retained)
    shown = ["-" if value is None else f"{value:.2f}" for value in cells]
    print(f"  {name:<14} {shown[0]:>9} {shown[1]:>9} {shown[2]:>9}")


if __name__ == "__main__":
    main()
