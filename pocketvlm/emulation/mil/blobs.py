"""Reads the weight file of an ML program package.

The file is a header of 64 bytes and, for each array, a record of 64 bytes that says where its
bytes are. Everything is little-endian and starts at multiples of 64. A program refers to an array
by the offset of its record.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from pocketvlm.emulation.mil.types import Array, Element
from pocketvlm.errors import BundleError

__all__ = ["WeightFile"]

_HEADER = struct.Struct("<II")
_RECORD = struct.Struct("<IIQQQ")
_ALIGNMENT = 64
_SENTINEL = 0xDEADBEEF
_VERSION = 2


class WeightFile:
    """A weight file, mapped into memory: an array takes memory once it is read."""

    def __init__(self, path: Path) -> None:
        """Maps the file and reads its header.

        Raises:
            BundleError: The file is missing, empty or of another version.
        """
        self.path = path
        try:
            self._bytes = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise BundleError(f"{path}: the weight file cannot be read: {error}") from error
        if len(self._bytes) < _ALIGNMENT:
            raise BundleError(f"{path}: {len(self._bytes)} bytes; a weight file has at least 64")
        _, version = _HEADER.unpack_from(self._bytes[: _HEADER.size].tobytes())
        if version != _VERSION:
            raise BundleError(
                f"{path}: weight file version {version}; this version reads {_VERSION}"
            )

    def read(self, offset: int, element: Element, count: int) -> Array:
        """One array, flat, in the type that it is stored in.

        Args:
            offset: Where its record begins.
            element: What the program declares it to be.
            count: The number of elements.

        Raises:
            BundleError: There is no such record, or it has another type or size.
        """
        where = f"{self.path}: the array at {offset}"
        record = self._bytes[offset : offset + _RECORD.size].tobytes()
        if len(record) < _RECORD.size:
            raise BundleError(f"{where} begins after the end of the file")
        sentinel, code, size, start, padding_bits = _RECORD.unpack(record)
        if sentinel != _SENTINEL:
            raise BundleError(f"{where} has no record there")
        if code != element.blob_code:
            raise BundleError(f"{where} has type code {code}, not that of {element.name}")
        stored_bits = size * 8 - (padding_bits if element.is_packed else 0)
        if stored_bits != count * element.bits:
            raise BundleError(
                f"{where} has {stored_bits} bits; {count} {element.name} have "
                f"{count * element.bits}"
            )
        data = self._bytes[start : start + size]
        if len(data) < size:
            raise BundleError(f"{where} ends after the end of the file")
        return element.decode(data.data, count)
