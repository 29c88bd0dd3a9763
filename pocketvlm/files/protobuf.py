"""Reads protocol-buffer messages by field number, without the toolkit that wrote them.

Importing coremltools costs seconds and brings torch along; a model specification needs neither.
The encoding is public: a message is a sequence of fields, each a key (number and kind) and a
payload. What the fields of a package mean is said in `package`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

__all__ = ["Message"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MORE = 0x80
"""Set in every byte of a number except its last."""
_LAST_SHIFT = 63


class Message:
    """One message: the payloads of its fields, in file order.

    Raises:
        ValueError: The bytes are not a message.
    """

    def __init__(self, data: bytes | memoryview = b"") -> None:
        self._fields: dict[int, list[int | memoryview]] = {}
        for number, payload in _fields(memoryview(data)):
            self._fields.setdefault(number, []).append(payload)

    def has(self, number: int) -> bool:
        """Whether a field is present."""
        return number in self._fields

    def messages(self, number: int) -> list[Message]:
        """A repeated field of messages."""
        return [Message(self._slice(value)) for value in self._fields.get(number, ())]

    def message(self, number: int) -> Message:
        """A message, empty if the field is absent; the last one if it is repeated."""
        found = self._fields.get(number)
        return Message(self._slice(found[-1])) if found else Message()

    def mapping(self, number: int) -> dict[str, Message]:
        """A field of type `map<string, message>`."""
        return {entry.text(1): entry.message(2) for entry in self.messages(number)}

    def data(self, number: int) -> bytes:
        """A bytes field, empty if absent."""
        found = self._fields.get(number)
        return bytes(self._slice(found[-1])) if found else b""

    def text(self, number: int) -> str:
        """A string, empty if the field is absent."""
        return self.data(number).decode()

    def texts(self, number: int) -> list[str]:
        """A repeated field of strings."""
        return [bytes(self._slice(value)).decode() for value in self._fields.get(number, ())]

    def integer(self, number: int) -> int:
        """A number, 0 if the field is absent."""
        found = self._fields.get(number)
        if not found:
            return 0
        if not isinstance(found[-1], int):
            raise ValueError(f"field {number} is not a number")  # noqa: TRY004  (the file is wrong)
        return _signed(found[-1])

    def integers(self, number: int) -> list[int]:
        """A repeated field of numbers, packed or not."""
        values: list[int] = []
        for value in self._fields.get(number, ()):
            if isinstance(value, int):
                values.append(_signed(value))
            else:
                place = 0
                while place < len(value):
                    found, place = _varint(value, place)
                    values.append(_signed(found))
        return values

    def floats(self, number: int, dtype: npt.DTypeLike) -> npt.NDArray[np.floating]:
        """A repeated field of float or double values, packed or not."""
        data = b"".join(bytes(self._slice(value)) for value in self._fields.get(number, ()))
        return np.frombuffer(data, dtype)

    @staticmethod
    def _slice(value: int | memoryview) -> memoryview:
        if isinstance(value, int):
            raise ValueError("a number stands for bytes")  # noqa: TRY004  (the file is wrong)
        return value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise ValueError("a field has number 0")
        if kind == _VARINT:
            value, place = _varint(data, place)
            yield number, value
            continue
        if kind == _BYTES:
            size, place = _varint(data, place)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field is of kind {kind}")
        if place + size > len(data):
            raise ValueError("a field ends after the end of its message")
        yield number, data[place : place + size]
        place += size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place >= len(data) or shift > _LAST_SHIFT:
            raise ValueError("a number does not end")
        byte = data[place]
        place += 1
        value |= (byte & ~_MORE) << shift
        if byte < _MORE:
            return value, place
        shift += 7


def _signed(value: int) -> int:
    """Negative numbers are encoded in 64 bits, whatever their type."""
    return value - (1 << 64) if value >> _LAST_SHIFT else value
