"""Messages between a process and the one that runs a program for it: JSON, and arrays as raw bytes.

A message is the length of its header in four bytes, the header, and the bytes of the arrays that
the header names by type and shape. Reading one runs no code, and the reader checks by the header
whether the arrays are what was asked for before a byte of them is read.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ArrayType", "FrameError", "array_types", "read_arrays", "read_header", "write_frame"]

_LENGTH = struct.Struct("<I")
_MAX_HEADER_BYTES = 2**20
_MAX_ARRAYS_BYTES = 2**32
_JOINED_BYTES = 2**16
_DTYPES = ("float32", "int64")


class FrameError(ValueError):
    """What came is not a message, or not the expected one."""


@dataclass(frozen=True)
class ArrayType:
    """Type and shape of an array."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> ArrayType:
        """What an array is."""
        return cls(array.dtype.name, array.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def write_frame(
    descriptor: int, values: Mapping[str, Any], arrays: Sequence[npt.NDArray[Any]] = ()
) -> None:
    """Sends a message.

    Args:
        descriptor: A pipe.
        values: JSON values of the header, by name; `arrays` is taken.
        arrays: The arrays.

    Raises:
        OSError: The other side has closed the pipe.
    """
    types = [[array.dtype.name, list(array.shape)] for array in arrays]
    header = json.dumps({**values, "arrays": types}).encode()
    parts = [_LENGTH.pack(len(header)) + header]
    parts += [np.ascontiguousarray(array).tobytes() for array in arrays]
    if sum(map(len, parts)) <= _JOINED_BYTES:  # the other side wakes up once
        parts = [b"".join(parts)]
    for part in parts:
        rest = memoryview(part)
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def read_header(descriptor: int, *, max_bytes: int = _MAX_HEADER_BYTES) -> dict[str, Any] | None:
    """The header of the next message, or `None` if the other side has closed the pipe.

    Args:
        descriptor: A pipe.
        max_bytes: The largest header that is read.

    Raises:
        EOFError: The other side closed in the middle of it.
        FrameError: It is not a header.
    """
    first = os.read(descriptor, _LENGTH.size)
    if not first:
        return None
    first += _read(descriptor, _LENGTH.size - len(first))
    (size,) = _LENGTH.unpack(first)
    if size > max_bytes:
        raise FrameError(f"a header of {size} bytes")
    # Not `parse_json`: a path whose bytes are not UTF-8 is spelled with halves of surrogate pairs.
    try:
        header = json.loads(bytes(_read(descriptor, size)))
    except (ValueError, RecursionError) as error:
        raise FrameError("a header that is not JSON") from error
    if not isinstance(header, dict):
        raise FrameError("a header that is not an object")
    return header


def array_types(header: Mapping[str, Any]) -> list[ArrayType]:
    """The arrays that a header says will follow.

    Raises:
        FrameError: It is not a header of `write_frame`.
    """
    found = []
    entries = header.get("arrays")
    if not isinstance(entries, list):
        raise FrameError("a header without arrays")
    for entry in entries:
        match entry:
            case [str(name), list(sizes)] if name in _DTYPES and all(
                type(n) is int and n >= 0 for n in sizes
            ):
                found.append(ArrayType(name, tuple(sizes)))
            case _:
                raise FrameError("an array without type and shape")
    return found


def read_arrays(descriptor: int, types: Sequence[ArrayType]) -> list[npt.NDArray[Any]]:
    """The arrays after a header.

    Args:
        descriptor: A pipe.
        types: What they are.

    Raises:
        EOFError: The other side closed before their end.
        FrameError: They are larger than any that a program of ours returns.
    """
    arrays = []
    for wanted in types:
        count = 1
        for size in wanted.shape:
            count *= size
        dtype = np.dtype(wanted.dtype)
        if count * dtype.itemsize > _MAX_ARRAYS_BYTES:
            raise FrameError(f"an array of {count * dtype.itemsize} bytes")
        data = _read(descriptor, count * dtype.itemsize)
        arrays.append(np.frombuffer(data, dtype).reshape(wanted.shape))
    return arrays


def _read(descriptor: int, size: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        part = os.read(descriptor, min(size - len(data), 2**20))
        if not part:
            raise EOFError("cut off")
        data += part
    return data
