"""JSON in and out: files (`documents`), and the dataclasses that they hold (`values`)."""

from __future__ import annotations

from pocketvlm.json_io.documents import parse_json, read_json, write_json
from pocketvlm.json_io.values import (
    OPTIONAL,
    REST,
    WHOLE,
    DecodeError,
    decode,
    encode,
    keyed,
)

__all__ = [
    "OPTIONAL",
    "REST",
    "WHOLE",
    "DecodeError",
    "decode",
    "encode",
    "keyed",
    "parse_json",
    "read_json",
    "write_json",
]
