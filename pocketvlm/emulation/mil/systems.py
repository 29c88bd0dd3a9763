"""Which systems read which version of the Core ML specification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["LOWEST_SYSTEMS", "Systems"]


class Systems(NamedTuple):
    """The lowest systems that read a version of the specification."""

    ios: str
    macos: str


LOWEST_SYSTEMS: Mapping[int, Systems] = {
    7: Systems("16.0", "13.0"),
    8: Systems("17.0", "14.0"),
    9: Systems("18.0", "15.0"),
}
"""By version: all that this package reads."""
