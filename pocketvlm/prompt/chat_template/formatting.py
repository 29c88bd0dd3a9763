"""Text formatting, `"%5d" % x` and `"{:>5}".format(x)`, with bounded padding."""

from __future__ import annotations

import re
from string import Formatter
from typing import Any

from jinja2.sandbox import SandboxedEnvironment, SandboxedFormatter

from pocketvlm.prompt.chat_template.budget import MAX_WIDTH, Budget, TemplateLimitError

__all__ = ["BoundedFormat", "format_percent"]

_WIDTH = re.compile(r"\d+")
_DIRECTIVE = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")


def format_percent(budget: Budget, text: str, arguments: Any) -> str:
    """The value of `text % arguments`.

    Raises:
        TemplateLimitError: It would be too large.
    """
    widths = [width for found in _DIRECTIVE.findall(text) for width in found if width]
    units = budget.weigh(arguments)
    budget.admit(len(text) + sum(map(_read_width, widths)) + text.count("%") * units)
    result = text % arguments
    budget.weigh(result)
    return result


class BoundedFormat(SandboxedFormatter):
    """`"...".format` with bounded padding."""

    def __init__(
        self, sandbox: SandboxedEnvironment, budget: Budget, text: str, *, by_map: bool
    ) -> None:
        super().__init__(sandbox)
        self._budget, self._text, self._by_map = budget, text, by_map

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        if self._by_map:
            (mapping,) = args
            return Formatter.vformat(self, self._text, (), mapping)
        return Formatter.vformat(self, self._text, args, kwargs)

    def format_field(self, value: Any, format_spec: str) -> str:
        for width in _WIDTH.findall(format_spec):
            _read_width(width)
        self._budget.step()
        self._budget.weigh(value)
        field: str = super().format_field(value, format_spec)
        self._budget.weigh(field)
        return field


def _read_width(text: str) -> int:
    if text == "*" or len(text) > len(str(MAX_WIDTH)) or int(text) > MAX_WIDTH:
        raise TemplateLimitError(f"it pads text to more than {MAX_WIDTH} characters")
    return int(text)
