"""One copy of a weight in a program file that both a delegate and a plain operator read.

A `.pte` keeps the constants of plain operators in one segment and each constant of a delegate in
its own segment. A tied embedding is in both. Where a delegate's segment repeats bytes of the other,
its offset is pointed at these and the copy is cut out. To a runtime nothing changes: it reads
`size` bytes at `offset` as before. Offsets have a fixed place in the file, so they are changed
where they stand.
"""

from __future__ import annotations

import struct

from pocketvlm.export.executorch.file import ProgramLayout, read_layout
from pocketvlm.runtime.executorch.program import PROGRAM_HEADER, PROGRAM_HEADER_START

__all__ = ["share_constants"]

_SMALLEST = 4096  # what is smaller is not worth a look
_ALIGNMENT = 128
_PADDING = 16  # constants of plain operators begin at multiples of this


def share_constants(data: bytes) -> bytes:
    """The program without copies of constants; the same bytes where there are none.

    Args:
        data: A `.pte` file.

    Raises:
        ExportError: It is none.
    """
    layout = read_layout(data)
    repeated = _find_repeated(data, layout)
    if not repeated:
        return data
    changed = bytearray(data[: layout.base])
    body = bytearray()
    offsets: dict[int, int] = {}
    for index in range(len(layout.segments)):
        if index not in repeated:
            body += bytes(-len(body) % _ALIGNMENT)
            offsets[index] = len(body)
            body += layout.content(data, index)
    home = offsets[layout.constant_segment or 0]
    for index, segment in enumerate(layout.segments):
        offset = home + repeated[index] if index in repeated else offsets[index]
        if segment.place is not None:
            struct.pack_into("<Q", changed, segment.place, offset)
    header = PROGRAM_HEADER.unpack_from(data, PROGRAM_HEADER_START)
    PROGRAM_HEADER.pack_into(changed, PROGRAM_HEADER_START, *header[:-1], len(body))
    return bytes(changed + body)


def _find_repeated(data: bytes, layout: ProgramLayout) -> dict[int, int]:
    """Segments of delegates that repeat a constant, with its offset in the constants' segment."""
    if layout.constant_segment is None:
        return {}
    constants = layout.content(data, layout.constant_segment)
    ends = (*layout.constant_offsets[1:], len(constants))
    known: dict[bytes, int] = {}
    for start, end in zip(layout.constant_offsets, ends, strict=True):
        if end - start >= _SMALLEST:
            # How much of the end is padding is not written anywhere.
            for padding in range(_PADDING):
                known.setdefault(constants[start : end - padding], start)
    return {
        index: known[content]
        for index in sorted(set(layout.named.values()))
        if layout.segments[index].place is not None
        and (content := layout.content(data, index)) in known
    }
