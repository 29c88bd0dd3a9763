"""Expands packed weights: a file that holds what masks keep, and everything else as it is.

A packed file begins with 16 bytes: `PVSPARSE`, the version and the length of the JSON document that
follows, both uint32, little-endian. The document names the file that was packed, its bytes and
sha256, and its spans in order. A span is `{"bytes": n}`, n bytes as they were, or a masked matrix
(`sparse_span`). Behind the document the content of the spans lies without gaps.

Expanding gives the packed file's bytes exactly, so that graphs and programs know nothing of it. It
is done in memory: nothing is left on a disk.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from pocketvlm.errors import BundleError
from pocketvlm.json_io import parse_json
from pocketvlm.runtime.sparse_span import Bytes, MaskedSpan

__all__ = ["MAGIC", "PREFIX", "VERSION", "ExpandedFile", "expand", "expanded_path", "plain_path"]

MAGIC = b"PVSPARSE"
VERSION = 1
PREFIX = struct.Struct("<8sII")
"""Magic, version, bytes of the JSON document."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpandedFile:
    """What a packed file stands for.

    Attributes:
        name: Name of the file that was packed.
        content: Its bytes.
        sha256: Their digest, as the packed file says.
        expand_ms: How long it took.
    """

    name: str
    content: Bytes
    sha256: str
    expand_ms: float


def expand(path: Path) -> ExpandedFile:
    """Expands a packed file into memory.

    Raises:
        BundleError: It is missing, cut off, changed in its structure, or of another version.
    """
    started = perf_counter()
    try:
        packed = np.memmap(path, np.uint8, mode="r")
        document, body = _read_document(packed)
        whole = _expand_spans(document, body)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise BundleError(f"{path}: there is no memory to expand it into") from error
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise BundleError(f"{path}: is no packed weight file, or is damaged: {error}") from error
    return ExpandedFile(
        name=str(document["file"]),
        content=whole,
        sha256=str(document["sha256"]),
        expand_ms=(perf_counter() - started) * 1e3,
    )


@contextmanager
def expanded_path(path: Path) -> Iterator[tuple[Path, float]]:
    """A packed file as a file that can be opened, and the milliseconds that it took.

    Where the system has files without a name, it is one of these; elsewhere it is removed behind
    the block. Who opened it meanwhile keeps it.

    Raises:
        BundleError: As `expand`.
    """
    whole = expand(path)
    started = perf_counter()
    if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
        descriptor = os.memfd_create(whole.name)
        with os.fdopen(descriptor, "wb") as stream:
            whole.content.tofile(stream)
            stream.flush()
            spent = whole.expand_ms + (perf_counter() - started) * 1e3
            del whole
            yield Path(f"/proc/self/fd/{descriptor}"), spent
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / whole.name
        whole.content.tofile(file)
        spent = whole.expand_ms + (perf_counter() - started) * 1e3
        del whole
        yield file, spent


@contextmanager
def plain_path(path: Path) -> Iterator[tuple[Path, None]]:
    """A file that needs no expanding, told as `expanded_path` tells one that does."""
    yield path, None


def _read_document(packed: Bytes) -> tuple[dict[str, Any], Bytes]:
    if packed.size < PREFIX.size:
        raise ValueError("it is cut off")
    magic, version, length = PREFIX.unpack(packed[: PREFIX.size].tobytes())
    if magic != MAGIC:
        raise ValueError("it does not begin as one")
    if version != VERSION:
        raise ValueError(f"it is of version {version}, and this one reads {VERSION}")
    body = PREFIX.size + length
    if body > packed.size:
        raise ValueError("it is cut off")
    document = parse_json(packed[PREFIX.size : body].tobytes(), "its document", error=ValueError)
    if not isinstance(document, dict):
        raise TypeError("its document is no object")
    return document, packed[body:]


def _expand_spans(document: dict[str, Any], body: Bytes) -> Bytes:
    spans = [_read_span(entry) for entry in document["spans"]]
    held = sum(span if isinstance(span, int) else sum(span.sections) for span in spans)
    total = sum(span if isinstance(span, int) else span.whole_bytes for span in spans)
    if held != body.size or total != document["bytes"]:
        raise ValueError(f"{body.size} bytes of {held} are there")
    # Masks that a later span asks for again, still packed.
    asked = {span.like for span in spans if isinstance(span, MaskedSpan)}
    masks: dict[int, tuple[MaskedSpan, Bytes]] = {}
    whole = np.empty(total, np.uint8)
    start = taken = 0
    for number, span in enumerate(spans):
        if isinstance(span, int):
            whole[start : start + span] = body[taken : taken + span]
            start, taken = start + span, taken + span
            continue
        parts = []
        for size in span.sections:
            # A copy, since a view of wider numbers wants them aligned.
            parts.append(body[taken : taken + size].copy())
            taken += size
        if number in asked:
            masks[number] = (span, parts[0])
        owner, mask = (span, parts[0]) if span.like is None else masks[span.like]
        keeps = owner.read_mask(mask)
        span.require_kept(keeps)
        whole[start : start + span.whole_bytes] = span.expand(keeps, *parts[1:])
        start += span.whole_bytes
    return whole


def _read_span(entry: Any) -> int | MaskedSpan:
    if not isinstance(entry, dict):
        raise TypeError("a span is no object")
    if "bytes" not in entry:
        return MaskedSpan.from_json(entry)
    size = entry["bytes"]
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"a span of {size!r} bytes")
    return size
