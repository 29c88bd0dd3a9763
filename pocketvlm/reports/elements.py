"""Elements that all parts of a page are made of: verdicts and tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Badge", "Column", "Table", "Tone", "numbers", "words"]

Tone = Literal["good", "bad", "warn", "plain"]


@dataclass(frozen=True, kw_only=True)
class Badge:
    """A verdict in a word or two."""

    text: str
    tone: Tone


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column and how it is aligned."""

    title: str
    is_number: bool


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a page or a card.

    Attributes:
        caption: What it shows, for readers who jump from table to table.
        columns: The first one names the row.
        rows: As many cells as there are columns.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


def words(*titles: str) -> tuple[Column, ...]:
    """Columns of text."""
    return tuple(Column(title=title, is_number=False) for title in titles)


def numbers(*titles: str) -> tuple[Column, ...]:
    """Columns of numbers, aligned at their right."""
    return tuple(Column(title=title, is_number=True) for title in titles)
