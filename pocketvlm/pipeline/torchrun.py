"""Processes that `torchrun` started for one run, over torch.distributed with gloo.

What they exchange are sums of statistics, finished layers and states, which are in main memory
anyway; so gloo serves on every device. A sum goes from rank to rank and back from the last one,
because the order in which a ring adds depends on where a piece of it lies.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from pocketvlm.context import ALONE, Ranks
from pocketvlm.errors import RankError

__all__ = ["join_ranks"]

_ENDED = "another process of this run has ended, and says why unless it was killed"
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PIECE = 1 << 22
# One process may work alone for long; one that has ended is noticed by its closed connection.
_PATIENCE = timedelta(days=30)


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """The processes that `torchrun` has started; this one alone where it has not.

    Raises:
        RankError: The others cannot be reached.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    with _said("the processes of this run cannot reach each other"):
        distributed.init_process_group("gloo", timeout=_PATIENCE)
    for name in _VARIABLES:
        os.environ.pop(name, None)  # children of this process are not ranks
    try:
        yield _Torchrun()
    finally:
        distributed.destroy_process_group()


class _Torchrun(Ranks):
    """Messages over gloo."""

    def __init__(self) -> None:
        self.rank = distributed.get_rank()
        self.count = distributed.get_world_size()

    def spread(self, values: NDArray[Any], owner: int) -> None:
        """Broadcasts."""
        with _said(_ENDED):
            distributed.broadcast(_tensor(values), owner)

    def add_up(self, values: NDArray[Any]) -> None:
        """Adds along the line of ranks, and broadcasts from its end."""
        own = torch.from_numpy(values.reshape(-1))
        with _said(_ENDED):
            for piece in own.split(_PIECE):
                if self.rank > 0:
                    before = torch.empty_like(piece)
                    distributed.recv(before, self.rank - 1)
                    piece.add_(before)
                if self.rank + 1 < self.count:
                    distributed.send(piece, self.rank + 1)
                distributed.broadcast(piece, self.count - 1)


@contextmanager
def _said(what: str) -> Iterator[None]:
    """Turns gloo's errors into one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise RankError(f"{what}; the same command resumes where this one stopped") from error


def _tensor(values: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(values if values.flags.writeable else np.array(values))
