"""Packs a file of weights: of masked matrices what the mask keeps, and everything else as it is.

Targets write their files as ever and note which bytes are masked weights. Values are then read out
of the file itself, so that nothing is decided here about codes, and the packed file is expanded
again and compared byte by byte before it takes the other's place. The format is that of
`runtime.sparse_file`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pocketvlm.errors import ExportError
from pocketvlm.files.reader import file_sha256
from pocketvlm.runtime.sparse_file import MAGIC, PREFIX, VERSION, expand
from pocketvlm.runtime.sparse_span import Bytes, MaskedSpan
from pocketvlm.weights.bitpack import pack_codes
from pocketvlm.weights.nonzeros import CodebookNonzeros, FloatNonzeros
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["CHOICES", "MaskedPlace", "pack_file"]

_BYTE = 8
_HALF, _WORD = 16, 32

CHOICES = (2, 4, 8)
"""Widths of the pieces of a row that may all keep equally many."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedPlace:
    """Bytes of a file that are a masked weight.

    Attributes:
        start: The first of them.
        form: The weight.
        bits: Width of an element: of a code, or of a float.
        width: Elements that a row has in the file, padding included; `None` for its columns.
        fills: What stands for zero, uint8 [rows, groups]; `None` for 0 everywhere.
        table_type: What 16-bit floats are: `torch.float16` or `torch.bfloat16`.
    """

    start: int
    form: SparseWeight
    bits: int
    width: int | None = None
    fills: Tensor | None = None
    table_type: torch.dtype = torch.float16

    def moved(self, offset: int) -> MaskedPlace:
        """The same weight `offset` bytes further on."""
        return replace(self, start=self.start + offset)


def pack_file(whole: Path, packed: Path, places: Sequence[MaskedPlace]) -> None:
    """Packs a file, and removes it once the packed one is known to be as good.

    Args:
        whole: The file.
        packed: What is written.
        places: Its masked weights, in any order; of two at one place the first counts.

    Raises:
        ExportError: What comes out of the packed file are other bytes.
    """
    data = np.memmap(whole, np.uint8, mode="r") if whole.stat().st_size else np.empty(0, np.uint8)
    pieces = list(_cut(places, data.size))
    described = [
        {"bytes": end - start} if span is None else span.to_json() for start, end, span, _ in pieces
    ]
    document = {
        "file": whole.name,
        "bytes": int(data.size),
        "sha256": file_sha256(whole),
        "spans": described,
    }
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    with packed.open("wb") as stream:
        stream.write(PREFIX.pack(MAGIC, VERSION, len(text)))
        stream.write(text)
        for start, end, span, place in pieces:
            piece = data[start:end]
            if span is None or place is None:
                piece.tofile(stream)
                continue
            for section in _sections(span, place, piece):
                section.tofile(stream)
    if not np.array_equal(expand(packed).content, data):
        raise ExportError(f"{packed.name}: does not expand to the bytes of {whole.name}")
    del data
    whole.unlink()


_Piece = tuple[int, int, MaskedSpan | None, MaskedPlace | None]


def _cut(places: Sequence[MaskedPlace], size: int) -> Iterator[_Piece]:
    """The file from its first byte to its last: what is masked, and what lies between."""
    number = end = 0
    masks: dict[bytes, int] = {}
    for place in sorted(places, key=lambda place: place.start):
        if place.start < end:  # the same bytes again
            continue
        span = _span(place)
        if sum(span.sections) >= span.whole_bytes:  # a mask can cost more than it leaves out
            continue
        if place.start > end:
            yield end, place.start, None, None
            number += 1
        bits = place.form.mask.numpy()
        mask = hashlib.sha256(f"{place.form.shape}".encode() + bits.tobytes()).digest()
        if mask in masks:
            span = replace(span, like=masks[mask], block=(1, 1), choice=None)
        masks.setdefault(mask, number)
        end = place.start + span.whole_bytes
        yield place.start, end, span, place
        number += 1
    if end < size:
        yield end, size, None, None


def _span(place: MaskedPlace) -> MaskedSpan:
    form, values = place.form, place.form.values
    rows, columns = form.shape
    layout: dict[str, Any] = {}
    if place.fills is not None:
        fill = int(place.fills.flatten()[0])
        if bool((place.fills == fill).all()):
            layout["fill"] = fill
        else:
            layout["group"] = -(-(place.width or columns) // place.fills.shape[1])
    if isinstance(values, FloatNonzeros) and place.bits == _WORD:
        layout["is_half"] = True
    if isinstance(values, CodebookNonzeros) and (values.row_scales is None or place.bits == _WORD):
        tables, _, entries, _ = values.codebooks.shape
        layout["tables"] = (values.index_bits, tables, entries)
        layout["row_scales"] = values.row_scales is not None
    return MaskedSpan(
        rows=rows,
        columns=columns,
        width=place.width or columns,
        bits=place.bits,
        kept=form.kept,
        **layout,
        **_mask_layout(form.keeps().numpy()),
    )


def _mask_layout(keeps: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """The shortest way to store a mask."""
    rows, columns = keeps.shape
    high = _steps((keeps[1:] != keeps[:-1]).any(axis=1), rows)
    wide = _steps((keeps[:, 1:] != keeps[:, :-1]).any(axis=0), columns)
    if high * wide > 1:
        return {"block": (high, wide)}
    for of in CHOICES:
        if columns % of == 0:
            counts = np.count_nonzero(keeps.reshape(rows, -1, of), axis=-1)
            keep = int(counts.flat[0])
            if 0 < keep < of and bool((counts == keep).all()):
                return {"choice": (keep, of)}
    return {}


def _steps(changes: npt.NDArray[np.bool_], length: int) -> int:
    """The largest block whose borders are all that changes."""
    return math.gcd(length, *(np.flatnonzero(changes) + 1).tolist())


def _sections(span: MaskedSpan, place: MaskedPlace, piece: Bytes) -> Iterator[Bytes]:
    """What the packed file holds of a matrix; `piece` are its bytes in the other file."""
    form, values = place.form, place.form.values
    keeps = form.keeps().numpy()
    if span.like is None:
        yield span.write_mask(keeps)
    if span.group and place.fills is not None:
        yield pack_codes(place.fills.numpy(), span.bits).reshape(-1)
    if isinstance(values, CodebookNonzeros) and span.tables is not None:
        yield values.packed.numpy()
        tables = values.codebooks
        if span.bits == _HALF:
            tables = tables.to(torch.float32).to(place.table_type)
        yield tables.contiguous().view(torch.uint8).numpy().reshape(-1)
        if values.row_scales is not None:
            yield values.row_scales.view(torch.uint8).numpy()
        return
    elements = span.elements(piece)[:, : span.columns][keeps]
    if span.is_half:
        yield elements.view("<f4").astype("<f2").view(np.uint8)
    elif span.bits > _BYTE:
        yield elements.view(np.uint8)
    else:
        yield pack_codes(elements, span.bits)
