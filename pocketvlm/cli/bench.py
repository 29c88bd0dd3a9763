"""Commands that time bundles and check the installation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketvlm.cli.console import print_json, print_latency, say
from pocketvlm.cli.devices import calibrate
from pocketvlm.cli.options import JsonOption, ThreadsOption
from pocketvlm.cli.progress import show_progress
from pocketvlm.errors import CheckFailedError, InputError

__all__ = ["bench", "doctor"]


def bench(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="A bundle to time in the same interleaved run.")
    ] = None,
    workload: Annotated[str, typer.Option(help="vlm, text or short.")] = "short",
    device: Annotated[str, typer.Option(help="The device that runs it.")] = "host",
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
    as_json: JsonOption = False,
) -> None:
    """Time a bundle: stages, two times to first token, rates, memory; raw samples kept."""
    from dataclasses import replace

    if calibrate_host:
        calibrate(threads=threads, as_json=as_json)
        return
    if bundle is None:
        raise InputError("BUNDLE is missing: which bundle is to be timed?")
    from pocketvlm.device_bench.controller import bench_bundle
    from pocketvlm.device_bench.workload import load_workload
    from pocketvlm.json_io import encode

    chosen = load_workload(workload)
    if repeats is not None:
        chosen = replace(chosen, repeats=repeats)
    with show_progress() as on_progress:
        result = bench_bundle(
            bundle,
            chosen,
            baseline=baseline,
            device=device,
            threads=threads,
            on_progress=on_progress,
        )
    print_latency(result)
    if as_json:
        print_json(encode(result))


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
