"""The processes that share one run, by their ranks: what they say to each other, in a fixed order.

Work is shared by numbers alone: item i is rank i % count's. Whatever is summed is summed in order
of rank, so that the same number of processes ends in the same bytes.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pocketvlm.files.publish import replace_file

__all__ = ["ALONE", "Ranks"]

ItemT = TypeVar("ItemT")

_PIECE_BYTES = 1 << 24
_MOST_AXES = 8


class Ranks(ABC):
    """This process among those that share a run.

    All of them make the same calls in the same order; each waits for the others.

    Attributes:
        rank: Of this process, from 0. The first one owns the run's folder.
        count: How many there are.
    """

    rank: int
    count: int

    @abstractmethod
    def spread(self, values: NDArray[Any], owner: int) -> None:
        """Overwrites a contiguous array, of one shape everywhere, by that of one rank.

        Raises:
            RankError: Another process has ended.
        """

    @abstractmethod
    def add_up(self, values: NDArray[Any]) -> None:
        """Overwrites a contiguous array by the sum of all ranks', added in order of rank.

        Raises:
            RankError: Another process has ended.
        """

    @property
    def is_first(self) -> bool:
        """Whether this is the process that owns the run's folder."""
        return self.rank == 0

    def owner(self, index: int) -> int:
        """Whose item this is."""
        return index % self.count

    def own(self, items: Sequence[ItemT]) -> Sequence[ItemT]:
        """The items of this rank."""
        return items[self.rank :: self.count]

    def in_order(self, own: Iterable[NDArray[Any]], count: int) -> Iterator[NDArray[Any]]:
        """The arrays of all ranks, item by item.

        Args:
            own: Those of this rank, of the same type everywhere.
            count: Of all ranks together.
        """
        if self.count == 1:
            yield from own
            return
        mine = iter(own)
        for index in range(count):
            owner = self.owner(index)
            yield self._spread_array(next(mine) if owner == self.rank else None, owner)

    def documents(self, document: Any) -> list[Any]:
        """The JSON values that each rank gives, in order of rank."""
        return [
            self._spread_document(document if owner == self.rank else None, owner)
            for owner in range(self.count)
        ]

    def first(self, document: Any) -> Any:
        """The JSON values that the first rank gives."""
        return self._spread_document(document if self.is_first else None, 0)

    def spread_file(self, path: Path, owner: int) -> None:
        """Makes a file of one rank a file of all, by the path that each gives."""
        if self.count == 1:
            return
        is_own = self.rank == owner
        size = self._spread_document(path.stat().st_size if is_own else None, owner)
        if is_own:
            with path.open("rb") as stream:
                for piece in _pieces(size):
                    self.spread(np.frombuffer(stream.read(piece), dtype=np.uint8), owner)
            return
        with replace_file(path) as aside, aside.open("wb") as stream:
            for piece in _pieces(size):
                values = np.empty(piece, dtype=np.uint8)
                self.spread(values, owner)
                stream.write(values.data)

    def spread_folder(self, folder: Path) -> None:
        """Makes a folder of the first rank a folder of all, by the path that each gives."""
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        for name in self.first([path.relative_to(folder).as_posix() for path in found]):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self.spread_file(path, 0)

    def _spread_document(self, document: Any, owner: int) -> Any:
        if self.count == 1:
            return document
        text = None
        if self.rank == owner:
            text = np.frombuffer(json.dumps(document).encode(), dtype=np.uint8)
        return json.loads(self._spread_array(text, owner).tobytes())

    def _spread_array(self, values: NDArray[Any] | None, owner: int) -> NDArray[Any]:
        """An array of any shape and type, which its owner alone knows."""
        head = np.zeros(_MOST_AXES + 2, dtype=np.int64)
        if values is not None:
            head[0], head[1] = ord(values.dtype.char), values.ndim
            head[2 : 2 + values.ndim] = values.shape
        self.spread(head, owner)
        shape = tuple(int(size) for size in head[2 : 2 + int(head[1])])
        if values is None:
            values = np.empty(shape, dtype=np.dtype(chr(int(head[0]))))
        else:
            values = np.ascontiguousarray(values)
        if values.size:
            self.spread(values.reshape(-1).view(np.uint8), owner)
        return values


class _Alone(Ranks):
    """One process does all of it."""

    rank = 0
    count = 1

    def spread(self, values: NDArray[Any], owner: int) -> None:
        """Leaves the array as it is."""

    def add_up(self, values: NDArray[Any]) -> None:
        """Leaves the array as it is."""


ALONE: Ranks = _Alone()
"""A process that shares nothing."""


def _pieces(size: int) -> Iterator[int]:
    while size > 0:
        yield min(size, _PIECE_BYTES)
        size -= _PIECE_BYTES
