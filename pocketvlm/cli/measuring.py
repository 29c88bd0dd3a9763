"""Commands that time bundles, and compare and show what was timed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketvlm.cli.console import print_json, print_latency, say
from pocketvlm.cli.options import BundleArgument, JsonOption, ThreadsOption, out_option
from pocketvlm.cli.progress import show_progress
from pocketvlm.errors import CheckFailedError

__all__ = ["bench", "compare", "devices", "doctor", "report"]


def bench(
    bundle: BundleArgument,
    baseline: Annotated[
        Path | None, typer.Option(help="A bundle that is timed in the same interleaved run.")
    ] = None,
    workload: Annotated[str, typer.Option(help="vlm, text or short.")] = "short",
    device: Annotated[str, typer.Option(help="Where it runs.")] = "host",
    repeats: Annotated[
        int | None, typer.Option(min=5, max=100_000, help="Repeats, at least 5.")
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time a bundle: stages, two times to first token, rates, memory; raw samples kept."""
    from dataclasses import replace

    from pocketvlm.device_bench.protocol import bench_bundle
    from pocketvlm.device_bench.workload import load_workload

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
        print_json(result)


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A report.json, or its folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The one that must not be worse.")],
    max_regress: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=SHARE", help="Allowed regression, e.g. decode_tok_s=0.05."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Exit with 1 when B is worse than A beyond the bound."""
    from pocketvlm.device_bench.compare import compare_reports, parse_bounds

    rows = compare_reports(first, second, parse_bounds(max_regress or ()))
    for row in rows:
        say(row.line())
    if as_json:
        print_json({"rows": [row.to_json() for row in rows]})
    worse = [row.metric for row in rows if not row.passed]
    if worse:
        raise CheckFailedError(f"worse than {first} beyond the bound: {', '.join(worse)}")


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders.")],
    out: Annotated[Path, out_option("The page.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page about one or several runs."""
    from pocketvlm.device_bench.html import render_html
    from pocketvlm.device_bench.report_file import read_report
    from pocketvlm.publish import replace_file

    page = render_html(*(read_report(run) for run in runs))
    with replace_file(out) as aside:
        aside.write_text(page, encoding="utf-8")
    say(f"report   {out}")


def devices(as_json: JsonOption = False) -> None:
    """List device profiles."""
    from dataclasses import asdict

    from pocketvlm.device_bench.devices import list_devices

    profiles = list_devices()
    for profile in profiles:
        say(f"{profile.name:<16} {profile.description}")
    if as_json:
        print_json({"devices": [asdict(profile) for profile in profiles]})


def doctor(as_json: JsonOption = False) -> None:
    """Say whether the installed versions fit together, and what is missing for which target."""
    from pocketvlm.pipeline.doctor import examine

    findings = examine()
    for finding in findings:
        say(finding.line())
    if as_json:
        print_json({"findings": [finding.to_json() for finding in findings]})
    broken = [finding.name for finding in findings if finding.verdict == "broken"]
    if broken:
        raise CheckFailedError(f"these do not fit: {', '.join(broken)}")
