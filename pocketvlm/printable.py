"""Shows untrusted text: control characters are written out, not obeyed.

Names in manifests, recipes, models and reports, and a model's answers, can hold characters that a
terminal takes as commands (ANSI escapes, in both forms) and characters that reorder a line, so that
it reads as something other than it says. Each is shown as its escape. Letters of every script, with
their combining marks, stay.
"""

from __future__ import annotations

import re

__all__ = ["STEERING", "printable", "printable_line"]

STEERING = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1, without tab and line feed
    "\u061c\u202a-\u202e\u2066-\u2069"  # writing direction
    "\u2028\u2029\ufeff\ufff9-\ufffb"  # line ends, byte order, annotations
    "\U000e0000-\U000e007f"  # invisible tags
    "\ud800-\udfff"  # lone surrogates, which cannot be encoded
)
"""The characters that are written out, as the inside of a regular expression's class."""

_STEERING = re.compile(f"[{STEERING}]")


def printable(text: str) -> str:
    """The text as a terminal or a page may show it; line breaks stay."""
    return _STEERING.sub(_escape, text)


def printable_line(text: str) -> str:
    """The text on one line: every run of white space becomes one space."""
    return printable(" ".join(text.split()))


def _escape(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode("ascii")
