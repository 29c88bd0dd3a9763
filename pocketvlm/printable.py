"""Text of anybody that is shown to a person: characters that steer are written out, not obeyed.

Names in manifests, recipes, models and reports, and what a model answers, can hold characters that
a terminal takes as commands (ANSI escapes, in both their forms) and characters that turn the order
of a line round, so that it reads as something else than it says. Each is shown as its escape.
Letters of every script, and the marks that they need, stay.
"""

from __future__ import annotations

import re

__all__ = ["STEERING", "printable", "printable_line"]

STEERING = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1, without tab and line feed
    "\u061c\u202a-\u202e\u2066-\u2069"  # order of writing
    "\u2028\u2029\ufeff\ufff9-\ufffb"  # line ends, byte order, annotations
    "\U000e0000-\U000e007f"  # tags, which nothing shows
    "\ud800-\udfff"  # halves of a pair, which no encoding can write
)
"""What is written out, as the inside of a class of a regular expression."""

_STEERING = re.compile(f"[{STEERING}]")


def printable(text: str) -> str:
    """The text, several lines of it where it has them, as a terminal or a page may show it."""
    return _STEERING.sub(_escape, text)


def printable_line(text: str) -> str:
    """The text on one line: every run of white space is one space."""
    return printable(" ".join(text.split()))


def _escape(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode("ascii")
