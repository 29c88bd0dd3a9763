"""The batches of one walk, shared among the processes of a run.

A batch holds the same samples however many processes there are, so that its states and its part of
a moment are the same bytes everywhere; only sums over batches are taken in another order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pocketvlm.calibration.data.prompts import PromptBatch
from pocketvlm.context import ALONE, Ranks

__all__ = ["SharedBatches"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedBatches:
    """Batches of all ranks, and which of them are this one's.

    Attributes:
        every: All of them; `None` for those outside of all moments.
        ranks: The processes.
    """

    every: Sequence[PromptBatch | None]
    ranks: Ranks = ALONE

    @cached_property
    def own(self) -> Sequence[PromptBatch | None]:
        """Those of this rank, by whose numbers it keeps their states."""
        return self.ranks.own(self.every)

    @cached_property
    def sides(self) -> tuple[bool, ...]:
        """Whether samples are held out; of all batches, so that all ranks sum the same moments."""
        return tuple(sorted({batch.held_out for batch in self.every if batch is not None}))

    def exchange(self, own: Iterable[Tensor]) -> Iterator[Tensor]:
        """A tensor of every batch of all ranks, in order, from those of this rank's own."""
        if self.ranks.count == 1:
            yield from own
            return
        arrays = (values.cpu().contiguous().numpy() for values in own)
        yield from map(torch.from_numpy, self.ranks.in_order(arrays, len(self.every)))
