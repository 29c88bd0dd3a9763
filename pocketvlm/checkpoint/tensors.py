"""Stored tensors: the headers of weight files, and single tensors mapped from them.

A file is mapped and not read: its pages come when they are used, and the system takes them back
when memory is short, so that a model may be larger than memory. What is written to such a tensor
stays in this process.
"""

from __future__ import annotations

import json
import math
import mmap
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pocketvlm.errors import CheckpointError

__all__ = [
    "FLOAT_TYPES",
    "StoredTensor",
    "check_shape",
    "hold_equal",
    "keep_in_file",
    "read_headers",
    "read_tensor",
    "tensors_equal",
]

FLOAT_TYPES = ("BF16", "F16", "F32", "F64")
"""Types of weights that are not quantized, in safetensors' spelling."""

_TORCH_TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
_PAGE = mmap.PAGESIZE  # what is smaller is copied: it would hold a page of the mapping anyway
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor is stored, and what the file's header says about it.

    Attributes:
        file: Its file.
        key: Its name there.
        dtype: Its type, in safetensors' spelling.
        shape: Its shape.
        begin: Its first byte in the file.
        content: The mapped file.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    content: mmap.mmap = field(repr=False, compare=False)


def read_headers(files: Sequence[Path], placed: Mapping[str, str]) -> dict[str, StoredTensor]:
    """Every tensor of the files by its stored name.

    Args:
        files: The weight files.
        placed: The file that an index names for each tensor; empty without an index.

    Raises:
        CheckpointError: A file is truncated or damaged, lacks a tensor that the index places in it,
            or two files hold different tensors of the same name.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        try:
            found = _read_header(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: is truncated or damaged: {error}") from error
        for key, tensor in found.items():
            if key in stored:
                hold_equal(stored[key], tensor)
            stored[key] = tensor
    for key, name in placed.items():
        if key not in stored:
            raise CheckpointError(
                f"{files[0].parent / name}: lacks tensor {key}, which the index places there"
            )
    return stored


def read_tensor(stored: StoredTensor) -> Tensor:
    """One tensor of a weight file; float64 becomes float32, as stock transformers narrows it.

    Raises:
        CheckpointError: It is of an unsupported type, or holds values that are not finite.
    """
    file, key = stored.file, stored.key
    if stored.dtype not in _TORCH_TYPES:
        raise CheckpointError(
            f"{file}: tensor {key} is of type {stored.dtype}, which is not read here; allowed are "
            f"{', '.join(FLOAT_TYPES)}"
        )
    value = _mapped(stored)
    if value.is_floating_point() and not all(
        bool(torch.isfinite(part).all()) for part in value.reshape(-1).split(_CHUNK_ELEMENTS)
    ):
        raise CheckpointError(f"{file}: tensor {key} holds values that are not finite")
    return value.to(torch.float32) if value.dtype == torch.float64 else value


def keep_in_file(values: Tensor, folder: Path | None) -> Tensor:
    """The same values, mapped from a file without a name, which goes when the tensor does.

    Args:
        values: What is kept; what is smaller than a page stays in memory.
        folder: Where the file goes; `None` leaves everything in memory.

    Raises:
        OSError: The disk is full.
    """
    if folder is None or values.nbytes < _PAGE:
        return values
    flat = values.detach().contiguous().reshape(-1)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        left = flat.view(torch.uint8).numpy().data
        while left:
            left = left[file.write(left) :]
        content = _map(file.fileno())
    return torch.frombuffer(content, dtype=flat.dtype).view(values.shape)


def hold_equal(first: StoredTensor, second: StoredTensor) -> None:
    """Refuses two tensors that stand for one weight, unless they are the same.

    Raises:
        CheckpointError: They differ, and nothing says which of them is right.
    """
    if not tensors_equal(first, second):
        raise CheckpointError(
            f"{first.file.parent}: tensor {first.key} of {first.file.name} and tensor {second.key} "
            f"of {second.file.name} stand for the same weight, and differ"
        )


def tensors_equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors hold the same numbers."""
    if first.shape != second.shape:
        return False
    pieces = (read_tensor(each).reshape(-1).split(_CHUNK_ELEMENTS) for each in (first, second))
    return all(
        torch.equal(one.to(torch.float32), other.to(torch.float32))
        for one, other in zip(*pieces, strict=True)
    )


def check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Checks a tensor's shape against the one that config.json implies.

    Raises:
        CheckpointError: They differ.
    """
    if found != expected:
        raise CheckpointError(f"tensor {name} is {found}, config.json says {expected}")


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file that safetensors finds whole.

    Raises:
        SafetensorError: The file is truncated or damaged.
        OSError: It cannot be read.
    """
    with safe_open(file, framework="np"):
        pass  # checks sizes, types and places of all tensors
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(start - 8))
        content = _map(stream.fileno())
    return {
        key: StoredTensor(
            file=file,
            key=key,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            begin=start + entry["data_offsets"][0],
            content=content,
        )
        for key, entry in header.items()
        if key != "__metadata__"
    }


def _map(descriptor: int) -> mmap.mmap:
    """The pages of a file, changed by nobody else's writes and changing nobody else's."""
    if not hasattr(mmap, "MAP_NORESERVE"):
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    # Without a claim on memory for pages that nobody writes to, which a large file may not get.
    return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | mmap.MAP_NORESERVE)


def _mapped(stored: StoredTensor) -> Tensor:
    dtype = _TORCH_TYPES[stored.dtype]
    count = math.prod(stored.shape)
    if count == 0:
        return torch.empty(stored.shape, dtype=dtype)
    size = count * dtype.itemsize
    data = torch.frombuffer(stored.content, dtype=torch.uint8, count=size, offset=stored.begin)
    if size < _PAGE or data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).reshape(stored.shape)
