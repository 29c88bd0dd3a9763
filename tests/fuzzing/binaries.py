"""Binary files changed by structure: safetensors by their header, protobuf field by field."""

from __future__ import annotations

import json
import random
import struct

from tests.fuzzing.damage import TEXTS, mutate_bytes
from tests.fuzzing.documents import mutate_document, mutate_value

__all__ = ["mutate_protobuf", "mutate_safetensors"]


def mutate_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Header by structure (types, shapes, places), its length, or bytes."""
    action = rng.random()
    if action < 0.25 or len(content) < 8:
        return mutate_bytes(rng, content)
    (length,) = struct.unpack("<Q", content[:8])
    if length > len(content) - 8:
        return mutate_bytes(rng, content)
    header, body = content[8 : 8 + length], content[8 + length :]
    if action < 0.35:
        lie = rng.choice((0, 1, length - 1, length + 1, len(content), 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", lie) + header + body
    document = json.loads(header)
    names = [name for name in document if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(names)
        field = rng.choice(("dtype", "shape", "data_offsets", "name", "any"))
        if name not in document:
            continue
        if field == "dtype":
            document[name]["dtype"] = rng.choice(
                (
                    "F64",
                    "F32",
                    "F16",
                    "BF16",
                    "I64",
                    "I8",
                    "U8",
                    "BOOL",
                    "F8_E4M3",
                    "F8_E8M0",
                    "F4",
                    "U64",
                    "C64",
                    "X",
                    "",
                    None,
                    3,
                )
            )
        elif field == "shape":
            document[name]["shape"] = mutate_value(rng, document[name]["shape"])
        elif field == "data_offsets":
            begin, end = document[name]["data_offsets"]
            other = document[rng.choice(names)] if rng.random() < 0.4 else None
            document[name]["data_offsets"] = (
                other["data_offsets"]
                if isinstance(other, dict) and "data_offsets" in other
                else rng.choice(
                    ([end, begin], [begin, end + 1], [0, 2**62], [-1, 3], [begin], [begin, 10**30])
                )
            )
        elif field == "name":
            document[rng.choice((*TEXTS, *names))] = document.pop(name)
        else:
            document = mutate_document(rng, document, 1)
            if not isinstance(document, dict):
                break
    text = json.dumps(document).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def mutate_protobuf(rng: random.Random, content: bytes) -> bytes:
    """A protobuf message, field by field, so that lengths stay true around what is changed."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = _mutate_message(rng, content, 0)
    return content


def _mutate_message(rng: random.Random, content: bytes, depth: int) -> bytes:
    fields = _split_message(content)
    if not fields:
        return mutate_bytes(rng, content)
    place = rng.randrange(len(fields))
    number, wire, value = fields[place]
    action = rng.random()
    if action < 0.08:
        del fields[place]
    elif action < 0.14:
        fields.insert(rng.randrange(len(fields) + 1), fields[place])
    elif action < 0.17:
        fields[place] = (rng.randrange(1, 40), wire, value)
    elif wire == 0:
        assert isinstance(value, int)
        extremes = (
            0,
            1,
            value + 1,
            value ^ 1,
            2**31 - 1,
            2**31,
            2**32,
            2**63 - 1,
            2**63,
            2**64 - 1,
            7,
            16,
        )
        fields[place] = (number, wire, rng.choice(extremes))
    elif wire == 2:
        assert isinstance(value, bytes)
        inner = _split_message(value)
        if inner and depth < 12 and rng.random() < 0.9:
            fields[place] = (number, wire, _mutate_message(rng, value, depth + 1))
        else:
            text = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
            fields[place] = (
                number,
                wire,
                rng.choice((text, value[: len(value) // 2], value * 2, b"")),
            )
    else:
        assert isinstance(value, bytes)
        fields[place] = (number, wire, bytes(rng.randrange(256) for _ in value))
    return b"".join(_join_field(*field) for field in fields)


def _split_message(content: bytes) -> list[tuple[int, int, int | bytes]]:
    """Fields of a message; empty where the content is none."""
    fields: list[tuple[int, int, int | bytes]] = []
    place = 0
    while place < len(content):
        try:
            key, place = _read_varint(content, place)
            number, wire = key >> 3, key & 7
            if number == 0 or wire not in (0, 1, 2, 5):
                return []
            if wire == 0:
                value, place = _read_varint(content, place)
                fields.append((number, wire, value))
                continue
            size = 8 if wire == 1 else 4
            if wire == 2:
                size, place = _read_varint(content, place)
        except IndexError:
            return []
        if place + size > len(content):
            return []
        fields.append((number, wire, content[place : place + size]))
        place += size
    return fields


def _read_varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 0x7F) << shift
        place += 1
        shift += 7
        if byte < 0x80:
            return value, place
        if shift > 63:
            raise IndexError


def _join_field(number: int, wire: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3 | wire) + _varint(value)
    head = _varint(number << 3 | wire)
    return head + (_varint(len(value)) if wire == 2 else b"") + value


def _varint(value: int) -> bytes:
    out = bytearray()
    value &= 2**64 - 1
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
