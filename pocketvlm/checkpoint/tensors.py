"""Stored tensors: the headers of weight files, and single tensors read from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    "read_headers",
    "read_tensor",
    "tensors_equal",
]

FLOAT_TYPES = ("BF16", "F16", "F32", "F64")
"""Types of weights that are not quantized, in safetensors' spelling."""

_CODE_TYPES = ("BOOL", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor is stored, and what the file's header says about it.

    Attributes:
        file: Its file.
        key: Its name there.
        dtype: Its type, in safetensors' spelling.
        shape: Its shape.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]


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
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  (a handle of safetensors cannot be iterated)
                    piece = tensors.get_slice(key)
                    found = StoredTensor(
                        file=file,
                        key=key,
                        dtype=piece.get_dtype(),
                        shape=tuple(piece.get_shape()),
                    )
                    if key in stored:
                        hold_equal(stored[key], found)
                    stored[key] = found
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: is truncated or damaged: {error}") from error
    for key, name in placed.items():
        if key not in stored:
            raise CheckpointError(
                f"{files[0].parent / name}: lacks tensor {key}, which the index places there"
            )
    return stored


def read_tensor(stored: StoredTensor) -> Tensor:
    """One tensor of a weight file; float64 becomes float32, as stock transformers narrows it.

    Raises:
        CheckpointError: It cannot be read, is of an unsupported type, or holds values that are not
            finite.
    """
    file, key = stored.file, stored.key
    if stored.dtype not in FLOAT_TYPES + _CODE_TYPES:
        raise CheckpointError(
            f"{file}: tensor {key} is of type {stored.dtype}, which is not read here; allowed are "
            f"{', '.join(FLOAT_TYPES)}"
        )
    # Opened again for each tensor: an open mapping would keep every page it touched.
    try:
        with safe_open(file, framework="pt") as tensors:
            value: Tensor = tensors.get_tensor(key).clone()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: tensor {key} cannot be read: {error}") from error
    if value.dtype == torch.float64:
        value = value.to(torch.float32)
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise CheckpointError(f"{file}: tensor {key} holds values that are not finite")
    return value


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
    return torch.equal(read_tensor(first).to(torch.float32), read_tensor(second).to(torch.float32))


def check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Checks a tensor's shape against the one that config.json implies.

    Raises:
        CheckpointError: They differ.
    """
    if found != expected:
        raise CheckpointError(f"tensor {name} is {found}, config.json says {expected}")
