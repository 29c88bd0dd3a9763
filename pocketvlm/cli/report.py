"""Commands that compare and show measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketvlm.cli.console import print_json, say
from pocketvlm.cli.options import JsonOption, out_option
from pocketvlm.errors import CheckFailedError

__all__ = ["compare", "report"]


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A report.json, or its folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The report that must not be worse.")],
    max_regress: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=SHARE", help="Allowed regression, e.g. decode_tok_s=0.05."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Exit with 1 if B is worse than A beyond the bound."""
    from pocketvlm.device_bench.compare import compare_files, parse_bounds

    rows = compare_files(first, second, parse_bounds(max_regress or ()))
    for row in rows:
        say(row.line())
    if as_json:
        print_json({"rows": [row.to_json() for row in rows]})
    worse = [row.metric for row in rows if not row.passed]
    if worse:
        raise CheckFailedError(f"worse than {first} beyond the bound: {', '.join(worse)}")


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders.")],
    out: Annotated[Path, out_option("The page to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page about one or several runs."""
    from pocketvlm.files.publish import replace_file
    from pocketvlm.reports.html import render_html
    from pocketvlm.reports.report_file import read_report

    page = render_html(*(read_report(run) for run in runs))
    with replace_file(out) as aside:
        aside.write_text(page, encoding="utf-8")
    say(f"report   {out}")
