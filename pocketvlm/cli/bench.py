"""Commands that time bundles and check the installation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketvlm.cli.console import command_line, print_json, print_latency, say
from pocketvlm.cli.devices import calibrate
from pocketvlm.cli.options import JsonOption, ThreadsOption, out_option
from pocketvlm.cli.progress import show_progress
from pocketvlm.errors import CheckFailedError, InputError

__all__ = ["bench", "doctor"]


def bench(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="BUNDLE...", help="Folders of bundles; the first is the one compared with."
        ),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            help="onnx or executorch; repeat for several. Default: the first that a bundle has."
        ),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="A bundle that is put before the others.")
    ] = None,
    workload: Annotated[
        str, typer.Option(help="vlm, short, llama-bench, litert-lm or core-ai.")
    ] = "short",
    device: Annotated[
        str,
        typer.Option(
            help="host, ssh:USER@HOST[:PORT], adb[:SERIAL], simulated:SCRIPT.yaml or a profile."
        ),
    ] = "host",
    runner: Annotated[
        Path | None,
        typer.Option(help="The runner's folder, packed or native. Default: the one in Python."),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=5, max=100_000, help="Repeats, at least 5.")
    ] = None,
    threads: ThreadsOption = None,
    calibrate_host: Annotated[
        bool,
        typer.Option(
            "--calibrate-host",
            help="Measure what this host's kernels reach, in a minute, for `plan --device host`; "
            "times no bundle.",
        ),
    ] = False,
    out: Annotated[Path | None, out_option("Write the document to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time bundles in turns: stages, two times to first token, rates, memory; samples kept."""
    from dataclasses import replace

    if calibrate_host:
        calibrate(threads=threads, as_json=as_json)
        return
    folders = [*([baseline] if baseline else ()), *(bundles or ())]
    if not folders:
        raise InputError("BUNDLE is missing: which bundle is to be timed?")
    from pocketvlm.device_bench.arm import pair_all
    from pocketvlm.device_bench.controller import bench_bundles
    from pocketvlm.device_bench.transports.table import transport_to
    from pocketvlm.device_bench.workload import load_workload
    from pocketvlm.json_io import encode, write_json
    from pocketvlm.machine import REPORT_SCHEMA

    chosen = load_workload(workload)
    if repeats is not None:
        chosen = replace(chosen, repeats=repeats)
    with show_progress() as on_progress:
        results = bench_bundles(
            pair_all(folders, runtime or ()),
            [chosen],
            transport=transport_to(device, runner),
            device=device,
            threads=threads,
            on_progress=on_progress,
        )
    for result in results:
        print_latency(result)
    document = {
        "schema": REPORT_SCHEMA,
        "command": command_line(),
        "bench": encode(results[0]),
        "grid": encode(results[1:]),
    }
    if out is not None:
        write_json(out, document)
    if as_json:
        print_json(document)
    withheld = [
        f"{name} ({', '.join(sorted(arm.withheld))})"
        for result in results
        for name, arm in result.arms.items()
        if arm.withheld
    ]
    if withheld:
        raise CheckFailedError(f"implausible, not published: {'; '.join(withheld)}")


def doctor(as_json: JsonOption = False) -> None:
    """Check whether the installed versions fit together, and what each target lacks."""
    from pocketvlm.pipeline.doctor import examine

    findings = examine()
    for finding in findings:
        say(finding.line())
    if as_json:
        print_json({"findings": [finding.to_json() for finding in findings]})
    broken = [finding.name for finding in findings if finding.verdict == "broken"]
    if broken:
        raise CheckFailedError(f"these versions do not fit: {', '.join(broken)}")
