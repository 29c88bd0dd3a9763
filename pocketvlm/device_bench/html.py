"""Renderings of a report: one self-contained HTML page, and the model card of a bundle.

The page needs no network, no script and no file beside it; its policy header forbids all three.
The same report gives the same bytes, so a page can be compared and cached.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pocketvlm.device_bench.view import view_run
from pocketvlm.device_bench.wording import NOT_MEASURED, format_bytes, format_number

__all__ = ["render_html", "render_markdown"]

_TEMPLATES = Path(__file__).parent / "templates"


def render_html(*reports: Mapping[str, Any]) -> str:
    """One page about one or several reports, or results of `bench_bundle`.

    Args:
        reports: Contents of report.json; blocks that are missing are shown as not measured.

    Raises:
        ValueError: No report was given.
    """
    if not reports:
        raise ValueError("render_html needs at least one report")
    runs = [view_run(report) for report in reports]
    return _environment(autoescape=True).get_template("report.html.j2").render(runs=runs)


def render_markdown(report: Mapping[str, Any]) -> str:
    """The measured model card of a bundle: its README.md."""
    return _environment(autoescape=False).get_template("card.md.j2").render(run=view_run(report))


@cache
def _environment(*, autoescape: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=autoescape,  # noqa: S701  (Markdown has its own filter, `cell`)
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": format_number,
        "bytes": format_bytes,
        "cell": _markdown_cell,
    }
    environment.globals["not_measured"] = NOT_MEASURED
    return environment


def _markdown_cell(text: str) -> str:
    """Text that cannot break out of a Markdown table, nor bring markup of its own."""
    flat = " ".join(str(text).split())
    for character in "\\`*_[]<>|#":
        flat = flat.replace(character, "\\" + character)
    return flat
