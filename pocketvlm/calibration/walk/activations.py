"""Hidden states of a whole calibration set, in memory while they fit and in a file when not."""

from __future__ import annotations

import errno
import io
import mmap
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

__all__ = ["MAIN_MEMORY", "MEMORY_BUDGET", "ActivationStore", "float64_device", "join_batches"]

MAIN_MEMORY = torch.device("cpu")

MEMORY_BUDGET = 32 * 1024 * 1024
"""Bytes of activations that are held in memory; beyond it, batches go to an unnamed file."""


def float64_device(device: torch.device) -> torch.device:
    """Where float64 is computed for a device: Metal has none, and leaves it to the processor."""
    return MAIN_MEMORY if device.type == "mps" else device


class ActivationStore:
    """A sequence of float32 batches that may each be replaced by one of the same shape.

    Spilled batches keep all their digits. The file has no name in the file system, so that a
    killed process leaves nothing behind.

    Args:
        folder: Where to spill; `None` for the system's temporary folder.
        budget: Bytes that may stay in memory.
        device: Where batches are computed with; they are kept in main memory and in the file.

    Attributes:
        device: The same.
    """

    def __init__(
        self,
        folder: Path | None = None,
        budget: int = MEMORY_BUDGET,
        *,
        device: torch.device = MAIN_MEMORY,
    ) -> None:
        self.device = device
        self._folder = folder
        self._free = budget
        self._held: list[Tensor | None] = []
        self._places: list[tuple[int, tuple[int, ...]]] = []
        self._file: io.RawIOBase | None = None
        self._end = 0

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: int) -> Tensor:
        return self._stored(index).to(self.device)

    def _stored(self, index: int) -> Tensor:
        held = self._held[index]
        if held is not None:
            return held
        assert self._file is not None  # noqa: S101  (whatever is not held was written)
        offset, shape = self._places[index]
        self._file.seek(offset)
        values = np.empty(shape, dtype=np.float32)
        left = values.reshape(-1).view(np.uint8).data
        while left:
            count = self._file.readinto(left)
            if not count:
                raise OSError(errno.EIO, "an activation file ends too early", str(self._folder))
            left = left[count:]
        return torch.from_numpy(values)

    def __setitem__(self, index: int, batch: Tensor) -> None:
        if self._held[index] is not None:
            self._held[index] = batch.cpu()
        else:
            self._write(self._places[index][0], batch)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def append(self, batch: Tensor) -> None:
        """Adds a batch at the end."""
        size = batch.numel() * 4
        if size <= self._free:
            self._free -= size
            self._held.append(batch.cpu())
            self._places.append((0, tuple(batch.shape)))
            return
        self._held.append(None)
        self._places.append((self._end, tuple(batch.shape)))
        self._write(self._end, batch)
        self._end += size

    def extend(self, batches: Iterable[Tensor]) -> None:
        """Adds batches at the end."""
        for batch in batches:
            self.append(batch)

    def copy(self) -> ActivationStore:
        """The same batches in another store."""
        other = ActivationStore(self._folder, self._free, device=self.device)
        for index in range(len(self)):
            other.append(self._stored(index))
        return other

    def close(self) -> None:
        """Frees memory and disk."""
        self._held.clear()
        self._places.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, offset: int, batch: Tensor) -> None:
        if self._file is None:
            # Closed, and thereby deleted, by `close`. On a full disk, a buffer would fail once more
            # when it is closed.
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
        self._file.seek(offset)
        _write(self._file, batch)


def join_batches(batches: Iterable[Tensor], folder: Path | None) -> Tensor:
    """Float32 batches along their first axis, as one tensor that lies in an unnamed file.

    Args:
        batches: At least one; all but the first axis are alike.
        folder: Where the file goes; `None` for the system's temporary folder.
    """
    shape: tuple[int, ...] = ()
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for batch in batches:
            shape = tuple(batch.shape[1:])
            _write(file, batch)
        content = mmap.mmap(file.fileno(), 0)
    return torch.frombuffer(content, dtype=torch.float32).view(-1, *shape)


def _write(file: io.RawIOBase, batch: Tensor) -> None:
    left = batch.cpu().contiguous().numpy().reshape(-1).view(np.uint8).data
    while left:
        left = left[file.write(left) :]
