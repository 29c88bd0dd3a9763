"""Commands that compare and show measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketvlm.cli.console import print_json, say
from pocketvlm.cli.options import JsonOption, out_option
from pocketvlm.errors import CheckFailedError, TooNoisyError

__all__ = ["compare", "report"]


def compare(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="A report.json, or its folder; alone: its arms.")
    ],
    second: Annotated[
        Path | None, typer.Argument(metavar="[B]", help="The report that must not be worse.")
    ] = None,
    arms: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Two arms of one interleaved run; B must not be worse."),
    ] = None,
    max_regress: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=SHARE",
            help="Another bound, or one more figure; repeat for several. Default: "
            "bundle_bytes=2%, peak_rss_bytes=10%, accuracy=1%, ttft_user_ms=5%, "
            "ttft_engine_ms=5%, decode_ms=5%.",
        ),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a table for a pull request.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Exit with 1 if B is worse than A beyond the bound.

    With 3 if noise hides whether it is.
    """
    from pocketvlm.device_bench.gate.bounds import parse_bounds
    from pocketvlm.device_bench.gate.compare import compare_files
    from pocketvlm.device_bench.gate.table import tabulate
    from pocketvlm.reports.html import render_table

    rows = compare_files(first, second, arms=arms, bounds=parse_bounds(max_regress or ()))
    for row in rows:
        say(row.line())
    if markdown is not None:
        _write(markdown, render_table(*tabulate(rows)))
    if as_json:
        print_json({"rows": [row.to_json() for row in rows]})
    noisy = [row.name for row in rows if row.verdict == "too noisy"]
    worse = [row.name for row in rows if not row.passed and row.verdict != "too noisy"]
    if worse:
        raise CheckFailedError(f"worse than {first} beyond the bound: {', '.join(worse)}")
    if noisy:
        raise TooNoisyError(
            f"too noisy to tell: {', '.join(noisy)}; more repeats or a quieter machine narrow it"
        )


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="REPORT...", help="Reports, or the folders that they are in."),
    ],
    out: Annotated[Path | None, out_option("The file to write [default: report.html].")] = None,
    per_device: Annotated[
        bool, typer.Option("--per-device", help="Also a page for each device, beside it.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="A short summary for a pull request, on stdout.")
    ] = False,
) -> None:
    """Write one HTML page about one or more reports, or Markdown.

    The page needs no other file, and no network.
    """
    from pocketvlm.reports.by_device import file_stem, split_by_device
    from pocketvlm.reports.html import render_html, render_markdown
    from pocketvlm.reports.report_file import read_report

    reports = [read_report(run) for run in runs]
    if markdown and out is None:
        print(render_markdown(*reports), end="")
        return
    file = out or Path("report.html")
    _write(file, render_markdown(*reports) if markdown else render_html(*reports))
    say(f"report   {file}")
    for device, part in split_by_device(reports).items() if per_device else ():
        page = file.with_name(f"{file.stem}-{file_stem(device)}{file.suffix}")
        _write(page, render_markdown(*part) if markdown else render_html(*part))
        say(f"report   {page}")


def _write(file: Path, text: str) -> None:
    from pocketvlm.files.publish import replace_file

    with replace_file(file) as aside:
        aside.write_text(text, encoding="utf-8")
