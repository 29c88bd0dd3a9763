"""Reads the layout of a `.pte` file: where its segments, constants and named data lie.

The file is a flatbuffer, an extended header after its first 8 bytes, and segments that the
flatbuffer finds by offset and size (ExecuTorch's "PTE file format"). What is read here is what
`sharing` moves and what tests compare; a runtime has its own reader.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from pocketvlm.errors import ExportError
from pocketvlm.runtime.executorch.program import PROGRAM_HEADER, PROGRAM_HEADER_START

__all__ = ["ProgramLayout", "Segment", "read_layout"]

# Places of fields in the schema's tables, by number.
_SEGMENTS, _CONSTANT_SEGMENT, _NAMED_DATA = 4, 5, 7


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of the file.

    Attributes:
        place: Where in the file its offset is written; `None` where it is 0, which is not written.
        offset: Where it begins, counted from the first segment.
        size: Its bytes.
    """

    place: int | None
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class ProgramLayout:
    """Where things are in a program.

    Attributes:
        base: Where the first segment begins.
        segments: All of them, in order.
        constant_segment: Number of the one with constants of plain operators; `None` without.
        constant_offsets: Where each constant begins in it.
        named: Number of the segment of each named datum, by its key.
    """

    base: int
    segments: tuple[Segment, ...]
    constant_segment: int | None
    constant_offsets: tuple[int, ...]
    named: Mapping[str, int]

    def content(self, data: bytes, index: int) -> bytes:
        """The bytes of a segment."""
        start = self.base + self.segments[index].offset
        return data[start : start + self.segments[index].size]


def read_layout(data: bytes) -> ProgramLayout:
    """Reads where things are in a `.pte` file.

    Raises:
        ExportError: It is not a program with segments.
    """
    try:
        base = PROGRAM_HEADER.unpack_from(data, PROGRAM_HEADER_START)[3]
        program = _Table(data, struct.unpack_from("<I", data)[0])
        constants = program.table(_CONSTANT_SEGMENT)
        return ProgramLayout(
            base=base,
            segments=tuple(
                Segment(place=entry.place(0), offset=entry.number(0), size=entry.number(1))
                for entry in program.tables(_SEGMENTS)
            ),
            constant_segment=constants.number(0, "<I") if constants else None,
            constant_offsets=constants.numbers(1) if constants else (),
            named={e.text(0): e.number(1, "<I") for e in program.tables(_NAMED_DATA)},
        )
    except struct.error as error:
        raise ExportError("executorch: the program is cut off") from error


class _Table:
    """A table of a flatbuffer; fields are told by number."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data = data
        self._position = position
        self._vtable = position - self._read("<i", position)

    def place(self, field: int) -> int | None:
        """Where a field's value stands; `None` where it is the default and not written."""
        entry = 4 + 2 * field
        if entry >= self._read("<H", self._vtable):
            return None
        offset = self._read("<H", self._vtable + entry)
        return self._position + offset if offset else None

    def number(self, field: int, kind: str = "<Q") -> int:
        """An integer, 0 by default."""
        place = self.place(field)
        return 0 if place is None else self._read(kind, place)

    def table(self, field: int) -> _Table | None:
        """A table inside of this one."""
        place = self.place(field)
        return None if place is None else _Table(self._data, self._follow(place))

    def tables(self, field: int) -> list[_Table]:
        """A vector of tables."""
        start, count = self._vector(field)
        return [_Table(self._data, self._follow(start + 4 * index)) for index in range(count)]

    def numbers(self, field: int) -> tuple[int, ...]:
        """A vector of unsigned 64-bit integers."""
        start, count = self._vector(field)
        return struct.unpack_from(f"<{count}Q", self._data, start)

    def text(self, field: int) -> str:
        """A string."""
        start, count = self._vector(field)
        return self._data[start : start + count].decode()

    def _vector(self, field: int) -> tuple[int, int]:
        place = self.place(field)
        if place is None:
            return 0, 0
        start = self._follow(place)
        return start + 4, self._read("<I", start)

    def _follow(self, place: int) -> int:
        return place + self._read("<I", place)

    def _read(self, kind: str, place: int) -> int:
        return int(struct.unpack_from(kind, self._data, place)[0])
