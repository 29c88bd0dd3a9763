"""Jinja's filters that chat templates may use, and the checks before those with large results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pocketvlm.prompt.chat_template.budget import (
    MAX_INTEGER_BITS,
    UNITS_PER_ITEM,
    Budget,
    TemplateLimitError,
    is_number,
)

__all__ = ["FILTERS", "FILTER_CHECKS", "Arguments"]

FILTERS = frozenset(
    "abs attr batch capitalize center count d default dictsort e escape filesizeformat "
    "first float forceescape format groupby indent int items join last length list lower "
    "map max min random reject rejectattr replace reverse round safe select selectattr "
    "slice sort string sum title tojson trim truncate unique upper urlencode wordcount".split()
)
"""Jinja's filters whose cost is linear in their input; wordwrap and striptags, say, cost more."""


class Arguments:
    """Arguments of a filter, by position or by name."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._args, self._kwargs = args, kwargs

    def get(self, place: int, name: str, default: Any) -> Any:
        """The argument at a position, or with a name."""
        if place < len(self._args):
            return self._args[place]
        return self._kwargs.get(name, default)


def _check_padding(budget: Budget, value: Any, arguments: Arguments) -> None:
    width = arguments.get(0, "width", 80)
    if isinstance(width, int):
        budget.admit(width)


def _check_indent(budget: Budget, value: Any, arguments: Arguments) -> None:
    width = arguments.get(0, "width", 4)
    lines = str(value).count("\n") + 2
    budget.admit(lines * (width if isinstance(width, int) else len(str(width))))


def _check_precision(budget: Budget, value: Any, arguments: Arguments) -> None:
    precision = arguments.get(0, "precision", 0)
    if isinstance(precision, int) and abs(precision) > MAX_INTEGER_BITS:
        raise TemplateLimitError(f"it rounds to more than {MAX_INTEGER_BITS} digits")


def _check_groups(budget: Budget, value: Any, arguments: Arguments) -> None:
    for name in ("linecount", "slices"):
        count = arguments.get(0, name, 1)
        if isinstance(count, int):
            budget.admit(count * UNITS_PER_ITEM)


def _check_sum(budget: Budget, value: Any, arguments: Arguments) -> None:
    if not is_number(arguments.get(1, "start", 0)):
        raise TemplateLimitError("it sums something other than numbers")


def _check_replacement(budget: Budget, value: Any, arguments: Arguments) -> None:
    old, new = arguments.get(0, "old", ""), arguments.get(1, "new", "")
    text = str(value)
    budget.admit(len(text) + text.count(str(old)) * len(str(new)))


def _check_join(budget: Budget, value: Any, arguments: Arguments) -> None:
    separator = str(arguments.get(0, "d", ""))
    budget.admit(budget.weigh(value) + len(value) * len(separator))


FILTER_CHECKS: Mapping[str, Callable[[Budget, Any, Arguments], None]] = {
    "batch": _check_groups,
    "center": _check_padding,
    "indent": _check_indent,
    "join": _check_join,
    "replace": _check_replacement,
    "round": _check_precision,
    "slice": _check_groups,
    "sum": _check_sum,
}
"""The checks that run before filters whose results can be larger than their inputs."""
