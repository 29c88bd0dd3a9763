"""Commands that time bundles and check the installation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketvlm.cli.console import command_line, print_json, print_latency, say, told_warnings
from pocketvlm.cli.devices import calibrate
from pocketvlm.cli.options import JsonOption, ThreadsOption, out_option, parse_resolution
from pocketvlm.cli.progress import show_progress
from pocketvlm.errors import CheckFailedError, InputError

if TYPE_CHECKING:
    from pocketvlm.reports.measurement import Measurement

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
    profile: Annotated[
        str | None, typer.Option(help="The device's profile, where --device does not name it.")
    ] = None,
    workload: Annotated[
        str, typer.Option(help="vlm, short, llama-bench, litert-lm or core-ai.")
    ] = "short",
    image_size: Annotated[
        list[int] | None,
        typer.Option(min=8, max=8192, help="Side of the pictures; repeat for a grid."),
    ] = None,
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, max=10**6, help="Tokens of each turn; repeat for a grid."),
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=2, max=10**6, help="Tokens to generate in each turn.")
    ] = None,
    pictures: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Generated pictures of the first turn.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture of yours instead; repeat for several.")
    ] = None,
    visual_tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=10**6,
            help="Tokens per tile of the vision graph, where bundles have several; repeat for a "
            "grid.",
        ),
    ] = None,
    resolution: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="The vision graph for pictures of this size, likewise. Default: the one closest "
            "to a picture's ratio of sides.",
        ),
    ] = None,
    turns: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Turns of the conversation.")
    ] = None,
    warm_ups: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Answers that are not measured.")
    ] = None,
    answers: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Measured answers of a process.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=5, max=100_000, help="Processes of a bundle and runtime.")
    ] = None,
    cool_down: Annotated[
        float | None, typer.Option(min=0, max=86_400, help="Pause before each process, in seconds.")
    ] = None,
    sustained: Annotated[
        float | None,
        typer.Option(min=1, max=86_400, help="Seconds of answers without a pause at the end."),
    ] = None,
    max_temperature: Annotated[
        float | None,
        typer.Option(min=-40, max=150, help="Wait before each process for these degrees Celsius."),
    ] = None,
    max_thermal_status: Annotated[
        int | None,
        typer.Option(min=0, max=6, help="Likewise: 0 is not throttled, 6 is shutting down."),
    ] = None,
    cool_time_limit: Annotated[
        float, typer.Option(min=0, max=86_400, help="Seconds until it is started all the same.")
    ] = 600.0,
    timeout: Annotated[
        float, typer.Option(min=1, max=86_400, help="Seconds that a process may take.")
    ] = 600.0,
    threads: ThreadsOption = None,
    calibrate_host: Annotated[
        bool,
        typer.Option(
            "--calibrate-host",
            help="Measure what this host's kernels reach, in a minute, for predicted times; "
            "times no bundle.",
        ),
    ] = False,
    out: Annotated[Path | None, out_option("Write the document to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time bundles in turns, on this host or on a device.

    Every stage, both times to first token, rates, memory and heat; all samples are kept.
    """
    if calibrate_host:
        calibrate(threads=threads, as_json=as_json)
        return
    folders = [*([baseline] if baseline else ()), *(bundles or ())]
    if not folders:
        raise InputError("BUNDLE is missing: which bundle is to be timed?")
    if out is not None:
        _require_writable(out)
    from pocketvlm.device_bench.arm import pair_all
    from pocketvlm.device_bench.controller.bench import (
        BenchInterrupted,
        BenchOptions,
        bench_bundles,
    )
    from pocketvlm.device_bench.controller.cooling import Cooling
    from pocketvlm.device_bench.devices import load_device
    from pocketvlm.device_bench.transports.table import transport_to
    from pocketvlm.device_bench.workload import change_workload, load_workload, vary_workload

    chosen = change_workload(
        load_workload(workload),
        new_tokens=new_tokens,
        pictures=pictures,
        image_files=tuple(image) if image else None,
        turns=turns,
        warm_ups=warm_ups,
        answers=answers,
        repeats=repeats,
        cool_down_s=cool_down,
        sustained_s=sustained,
    )
    waits = max_temperature is not None or max_thermal_status is not None
    cooling = Cooling(
        max_temperature_c=max_temperature,
        max_status=max_thermal_status,
        time_limit_s=cool_time_limit,
    )
    known = load_device(profile) if profile is not None else None
    options = BenchOptions(
        device=device if known is None else known.name,
        profile=known,
        threads=threads,
        timeout_s=timeout,
        cooling=cooling if waits else None,
    )
    try:
        with show_progress() as on_progress, told_warnings():
            results = bench_bundles(
                pair_all(folders, runtime or ()),
                vary_workload(
                    chosen,
                    image_sizes=image_size or (),
                    prompt_tokens=prompt_tokens or (),
                    visual_tokens=visual_tokens or (),
                    resolutions=[
                        size for text in resolution or () if (size := parse_resolution(text))
                    ],
                ),
                transport=transport_to(device, runner),
                options=options,
                on_progress=on_progress,
            )
    except BenchInterrupted as interrupt:
        _show(interrupt.results, out, as_json=as_json)
        raise
    _show(results, out, as_json=as_json)


def _require_writable(out: Path) -> None:
    """Refuses a place that nothing can be written to before an hour is spent on measuring.

    Raises:
        InputError: It is a folder, or its own folder is missing or read-only.
    """
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; name a file in it")
    if not os.access(out.parent, os.W_OK):
        why = "cannot be written to" if out.parent.is_dir() else "is not a folder"
        raise InputError(f"--out {out}: {out.parent} {why}")


def _show(results: Sequence[Measurement], out: Path | None, *, as_json: bool) -> None:
    """Prints and writes the measurements.

    Raises:
        CheckFailedError: A figure is implausible, or an arm has none.
    """
    from pocketvlm.json_io import encode, write_json
    from pocketvlm.machine import REPORT_SCHEMA

    for result in results:
        if len(results) > 1 and result.workload is not None:
            say(f"workload {result.workload.name}")
        print_latency(result)
        for note in result.notes:
            say(f"note     {note}")
    document = {
        "schema": REPORT_SCHEMA,
        "command": command_line(),
        "bench": encode(results[0]),
        "grid": encode(results[1:]),
    }
    if out is not None:
        write_json(out, document)
        say(f"report   {out}")
    if as_json:
        print_json(document)
    arms = [(name, arm) for result in results for name, arm in result.arms.items()]
    problems = [
        *(f"{name} was not measured" for name, arm in arms if arm.latency.failed is not None),
        *(
            f"{name}: not published: {', '.join(sorted(arm.withheld))}"
            for name, arm in arms
            if arm.withheld
        ),
    ]
    if problems:
        raise CheckFailedError("; ".join(dict.fromkeys(problems)))


def doctor(as_json: JsonOption = False) -> None:
    """Check whether the installed versions fit together.

    Says what each target lacks.
    """
    from pocketvlm.pipeline.doctor import examine

    findings = examine()
    for finding in findings:
        say(finding.line())
    if as_json:
        print_json({"findings": [finding.to_json() for finding in findings]})
    broken = [finding.name for finding in findings if finding.verdict == "broken"]
    if broken:
        raise CheckFailedError(f"these versions do not fit: {', '.join(broken)}")
