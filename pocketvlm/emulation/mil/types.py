"""Types of a MIL program's values, and how this evaluator holds them.

Half-precision values are computed in float32 and rounded to float16 after every operator that
declares a float16 result: the arithmetic of a device that accumulates wider than it stores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketvlm.errors import BundleError

__all__ = ["ELEMENTS", "Array", "Element", "TensorType", "unpack_bits"]

Array = npt.NDArray[Any]
_BYTE = 8


@dataclass(frozen=True, kw_only=True)
class Element:
    """Type of one element.

    Attributes:
        name: As the format's schema names it, such as `FLOAT16`.
        code: Its number in the schema.
        bits: Width in a weight file.
        stored: What a whole number of bytes of it is read as; for packed types, one code per byte.
        held: What arrays of it hold while a program runs.
        blob_code: Its number in a weight file's records; `None` where none can hold it.
    """

    name: str
    code: int
    bits: int
    stored: np.dtype[Any]
    held: np.dtype[Any]
    blob_code: int | None = None

    @property
    def is_packed(self) -> bool:
        """Whether several elements share a byte."""
        return self.bits < _BYTE and self.stored != np.bool_

    def fit(self, values: Array) -> Array:
        """Values as a variable of this type holds them: rounded, truncated or wrapped.

        Returns:
            The same array where nothing changes.
        """
        if self.name == "FLOAT16":
            with np.errstate(over="ignore"):  # beyond 65504 lies infinity, as on the device
                return values.astype(np.float16).astype(np.float32)
        if values.dtype == self.held:
            return values
        with np.errstate(invalid="ignore"):
            return values.astype(self.held)

    def decode(self, data: bytes | memoryview, count: int) -> Array:
        """Elements from their bytes.

        Args:
            data: Little-endian; packed types start with the lowest bits of the first byte.
            count: Elements.

        Raises:
            ValueError: The bytes are too few.
        """
        expected = -(-count * self.bits // 8)
        if len(data) < expected:
            raise ValueError(f"{len(data)} bytes, {expected} are needed for {count} {self.name}")
        if not self.is_packed:
            return np.frombuffer(data, self.stored, count)
        codes = unpack_bits(np.frombuffer(data, np.uint8, expected), self.bits, count)
        if self.stored.kind == "i":
            sign = 1 << (self.bits - 1)
            return (codes ^ sign).astype(np.int8) - np.int8(sign)
        return codes


def _element(
    name: str, code: int, bits: int, stored: Any, blob_code: int | None = None, held: Any = None
) -> Element:
    return Element(
        name=name,
        code=code,
        bits=bits,
        stored=np.dtype(stored),
        held=np.dtype(stored if held is None else held),
        blob_code=blob_code,
    )


ELEMENTS: Mapping[str, Element] = {
    element.name: element
    for element in (
        _element("BOOL", 1, 8, np.bool_),
        _element("STRING", 2, 8, object),
        _element("FLOAT16", 10, 16, np.float16, 1, held=np.float32),
        _element("FLOAT32", 11, 32, np.float32, 2),
        _element("FLOAT64", 12, 64, np.float64),
        _element("INT4", 25, 4, np.int8, 8),
        _element("INT8", 21, 8, np.int8, 4),
        _element("INT16", 22, 16, np.int16, 6),
        _element("INT32", 23, 32, np.int32, 14),
        _element("INT64", 24, 64, np.int64),
        _element("UINT1", 37, 1, np.uint8, 9),
        _element("UINT2", 36, 2, np.uint8, 10),
        _element("UINT3", 39, 3, np.uint8, 12),
        _element("UINT4", 35, 4, np.uint8, 11),
        _element("UINT6", 38, 6, np.uint8, 13),
        _element("UINT8", 31, 8, np.uint8, 3),
        _element("UINT16", 32, 16, np.uint16, 7),
        _element("UINT32", 33, 32, np.uint32, 15),
        _element("UINT64", 34, 64, np.uint64),
    )
}
"""Every type that a program may use, by its name in the schema."""


@dataclass(frozen=True)
class TensorType:
    """Element type and shape; `None` stands for a dimension that varies."""

    element: Element
    shape: tuple[int | None, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape, where no dimension varies.

        Raises:
            BundleError: One does.
        """
        sizes = tuple(size for size in self.shape if size is not None)
        if len(sizes) < len(self.shape):
            raise BundleError(f"the shape of a {self} is not fixed")
        return sizes

    @property
    def count(self) -> int:
        """Elements, where no dimension varies.

        Raises:
            BundleError: One does.
        """
        return math.prod(self.sizes)

    def admits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape may be its value."""
        return len(shape) == len(self.shape) and all(
            declared is None or declared == found
            for declared, found in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.element.name.lower()} [{sizes}]"


def unpack_bits(data: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Unsigned codes from a stream of bits, the lowest bit of the first byte first.

    Args:
        data: The bytes.
        bits: Width of one code, 1 to 8.
        count: Codes.
    """
    stream = np.unpackbits(data, bitorder="little", count=count * bits).reshape(count, bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    codes: npt.NDArray[np.uint8] = (stream * weights).sum(axis=1, dtype=np.uint8)
    return codes
