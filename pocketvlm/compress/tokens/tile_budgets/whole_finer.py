"""The whole picture finer than its tiles, and every tile alike: two numbers, known beforehand.

HiRED (arXiv 2408.10945, section 4.1) gives the whole picture a share alpha of all tokens, and its
ablation finds half of them best. Here the two numbers are named, so that every picture of a size
has the same number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pocketvlm.bundle import TileBudget
from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.compress.tokens.tile_budgets.kind import Resolve, TileBudgetKind
from pocketvlm.models.spec import ModelSpec

__all__ = ["WholeFiner"]


@dataclass(frozen=True, kw_only=True)
class WholeFiner(TileBudgetKind):
    """One number for the whole picture, another for each of its tiles."""

    kind: Literal["whole_finer"] = "whole_finer"

    def plan(
        self, spec: ModelSpec, kept: Sequence[int], reducer: Reducer, resolve: Resolve
    ) -> TileBudget:
        """The budget of one model."""
        self._require_tiles(spec)
        tile = self._graph_of("tile", self.tile, kept, resolve)
        whole = self._graph_of("whole", self.whole, kept, resolve)
        return TileBudget(whole=whole, tile=tile, levels=(tile,), by="nothing")
