"""Named arrays over a pipe: the length of a frame in eight bytes, then an `npz` archive."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

from pocketvlm.emulation.mil.types import Array

__all__ = ["FRAME_HEADER", "decode_frame", "encode_frame", "read_frame", "write_frame"]

FRAME_HEADER = struct.Struct("<Q")


def encode_frame(arrays: Mapping[str, Array]) -> bytes:
    """A frame of arrays; object arrays are refused, since reading them would run code.

    Raises:
        ValueError: An array holds objects.
    """
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    body = stream.getvalue()
    return FRAME_HEADER.pack(len(body)) + body


def decode_frame(body: bytes) -> dict[str, Array]:
    """The arrays of a frame without its header.

    Raises:
        ValueError: It is not a frame.
    """
    try:
        with np.load(io.BytesIO(body), allow_pickle=False) as archive:
            return dict(archive)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"not a frame of arrays: {error}") from error


def write_frame(stream: BinaryIO, arrays: Mapping[str, Array]) -> None:
    """Sends a frame."""
    stream.write(encode_frame(arrays))
    stream.flush()


def read_frame(stream: BinaryIO) -> dict[str, Array] | None:
    """Receives a frame; `None` if the other side has closed the pipe.

    Raises:
        ValueError: What came is not a frame.
    """
    header = stream.read(FRAME_HEADER.size)
    if len(header) < FRAME_HEADER.size:
        return None
    (size,) = FRAME_HEADER.unpack(header)
    return decode_frame(stream.read(size))
