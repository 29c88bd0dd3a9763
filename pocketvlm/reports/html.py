"""Renderings of reports: a self-contained HTML page, Markdown, and the model card of a bundle.

The page needs no network, no script and no file beside it; its policy header forbids all three.
The same report gives the same bytes, so a page can be compared and cached.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pocketvlm.printable import printable, printable_line
from pocketvlm.reports.elements import Table
from pocketvlm.reports.formatting import NOT_MEASURED, format_bytes, format_measured
from pocketvlm.reports.report import Report
from pocketvlm.reports.view import view_page
from pocketvlm.reports.view_run import view_run

__all__ = ["render_card", "render_html", "render_markdown", "render_table"]

_MARKUP = re.compile(r"[\\`*_{}\[\]<>|#~&$@]")
_BLOCK = re.compile(r"\A(?:(?=[-+=!])|(\d+)(?=[.)](?:\s|\Z)))")  # a list, a rule, a heading
_LINK = re.compile(r"\bwww\.|\b[A-Za-z][A-Za-z+.-]*:(?=//)")  # GitHub turns these into links
_LONGEST = 4000  # characters of one value
_TEMPLATES = Path(__file__).parent / "templates"


def render_html(*reports: Report) -> str:
    """One page about one or several reports; blocks that are missing are shown as not measured.

    Raises:
        ValueError: No report was given.
    """
    if not reports:
        raise ValueError("render_html needs at least one report")
    page = view_page(reports)
    return _environment(autoescape=True).get_template("report.html.j2").render(page=page)


def render_card(report: Report) -> str:
    """The measured model card of a bundle: its README.md."""
    return _environment(autoescape=False).get_template("card.md.j2").render(run=view_run(report))


def render_markdown(*reports: Report) -> str:
    """A short summary of one or several reports, for a pull request.

    Raises:
        ValueError: No report was given.
    """
    if not reports:
        raise ValueError("render_markdown needs at least one report")
    page = view_page(reports)
    return _environment(autoescape=False).get_template("summary.md.j2").render(page=page)


def render_table(title: str, table: Table) -> str:
    """One table with a heading and its caption below, as Markdown."""
    template = _environment(autoescape=False).get_template("comparison.md.j2")
    return template.render(title=title, table=table)


@cache
def _environment(*, autoescape: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=autoescape,  # noqa: S701  (Markdown is escaped by `_markdown_text`)
        undefined=StrictUndefined,
        finalize=_shown if autoescape else _markdown_text,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "measured": format_measured,
        "bytes": format_bytes,
        "command": _shell_line,
        "markup": _Escaped,
    }
    environment.globals["not_measured"] = NOT_MEASURED
    return environment


class _Escaped(str):
    """Text that is already escaped."""

    __slots__ = ()


def _markdown_text(value: Any) -> str:
    """Escapes the value of every expression in the card: one line, no markup, no link.

    It cannot break out of a table either. The environment applies it, so no template can forget it.
    """
    if isinstance(value, _Escaped):
        return value
    flat = _MARKUP.sub(r"\\\g<0>", _clip(printable_line(str(value))))
    flat = _BLOCK.sub(r"\1\\", flat)
    return _LINK.sub(lambda found: f"{found.group()[:-1]}\\{found.group()[-1]}", flat)


def _shell_line(text: str) -> _Escaped:
    """A command that cannot end its fenced block."""
    return _Escaped(_clip(printable_line(str(text))).replace("```", r"\`\`\`"))


def _shown(value: Any) -> Any:
    """The value of every expression in the page before it is escaped as HTML."""
    if isinstance(value, Markup):
        return Markup(printable(value))  # noqa: S704  (its escapes contain no markup)
    return _clip(printable(value)) if isinstance(value, str) else value


def _clip(text: str) -> str:
    """Text that is far too long for a page says how much of it there was."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}… ({len(text):,} characters)"
