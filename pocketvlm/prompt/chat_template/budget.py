"""What one rendering of a chat template may compute, counted while it runs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from jinja2 import TemplateError
from jinja2.utils import Namespace

__all__ = [
    "MAX_DEPTH",
    "MAX_INTEGER_BITS",
    "MAX_WIDTH",
    "UNITS_PER_ITEM",
    "Budget",
    "TemplateLimitError",
    "is_number",
    "require_small",
]

MAX_DEPTH = 100
MAX_WIDTH = 4096
MAX_INTEGER_BITS = 64
UNITS_PER_ITEM = 8

_UNITS = 2**24  # a character is one unit; a few seconds of the slowest work, and at most 150 MB
_LARGEST = 2**22
_PER_CHARACTER_OF_INPUT = 64
_UNITS_PER_STEP = 64
_SECONDS = 5.0  # of this thread's processor time: a second limit, in case the units misjudge
_CONTAINERS: tuple[type[Any], ...] = (
    list,
    tuple,
    set,
    frozenset,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)


class TemplateLimitError(TemplateError):
    """A template computes more than it may."""


class Budget:
    """The work that one rendering may still do.

    Attributes:
        largest: Units of the largest value; a character counts one, a list item eight.
    """

    def __init__(self, inputs: Any = ()) -> None:
        """Starts counting.

        Args:
            inputs: What the template receives; larger inputs allow more work.
        """
        self.largest = 2**62
        self._left = 2**62
        size = self.weigh(inputs)
        self.largest = _LARGEST + _PER_CHARACTER_OF_INPUT * size
        self._left = _UNITS + _PER_CHARACTER_OF_INPUT * size
        self._deadline = time.thread_time() + _SECONDS

    def step(self) -> None:
        """Counts an iteration of a loop, or a call."""
        self.spend(_UNITS_PER_STEP)
        if time.thread_time() > self._deadline:
            raise TemplateLimitError(f"it runs for more than {_SECONDS:.0f} seconds")

    def spend(self, units: int) -> None:
        """Counts work."""
        self._left -= units
        if self._left < 0:
            raise TemplateLimitError("it computes too much")

    def admit(self, units: int) -> None:
        """Refuses a value that would be too large, before it is made."""
        if units > self.largest:
            raise TemplateLimitError(f"it makes a value of more than {self.largest:,} characters")

    def weigh(self, value: Any) -> int:
        """Counts the work of copying, comparing or writing a value; returns its units."""
        units = self._size(value, 0)
        self.spend(units)
        return units

    def _size(self, value: Any, depth: int) -> int:
        if isinstance(value, str):
            units = len(value) + 1
        elif isinstance(value, int):
            units = 1 + value.bit_length() // 8
        elif isinstance(value, dict):
            return self._size_of_items((*value.keys(), *value.values()), depth)
        elif isinstance(value, _CONTAINERS):
            return self._size_of_items(value, depth)
        elif isinstance(value, Namespace):
            attributes = object.__getattribute__(value, "_Namespace__attrs")
            return self._size(attributes, depth)
        else:
            return 1
        self.admit(units)
        return units

    def _size_of_items(self, items: Iterable[Any], depth: int) -> int:
        if depth == MAX_DEPTH:
            raise TemplateLimitError(f"it nests values more than {MAX_DEPTH} deep")
        units = UNITS_PER_ITEM
        for item in items:
            units += UNITS_PER_ITEM + self._size(item, depth + 1)
            if units > self.largest:
                self.spend(units)
                self.admit(units)
        return units


def is_number(value: Any) -> bool:
    """Whether a value is a number or a boolean."""
    return isinstance(value, int | float)


def require_small(value: Any) -> Any:
    """The value, unless it is a whole number too large to compute with."""
    if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
        raise TemplateLimitError(f"it makes a number of more than {MAX_INTEGER_BITS} bits")
    return value
