"""Budgets that are shared among tiles by what these show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pocketvlm.bundle import TileBudget
from pocketvlm.compress.tokens.tile_budgets.kind import Resolve, TileBudgetKind
from pocketvlm.errors import RecipeError
from pocketvlm.models.spec import ModelSpec

__all__ = ["SharedBudget"]


@dataclass(frozen=True, kw_only=True)
class SharedBudget(TileBudgetKind):
    """Tiles share `tile` tokens each, in the steps that there are vision graphs for.

    Attributes:
        tile: Tokens of a tile on average, a share or a number: tiles together have at most as many.
    """

    def _shared(
        self,
        spec: ModelSpec,
        kept: Sequence[int],
        resolve: Resolve,
        *,
        by: Literal["detail", "whole_tokens"],
    ) -> TileBudget:
        self._require_tiles(spec)
        if len(kept) == 1:
            raise RecipeError(
                f"tile_budget: {self.kind} gives tiles different numbers of tokens, and keep makes "
                f"a vision graph for {kept[0]} alone; name several"
            )
        whole, tile = self._graph_of("whole", self.whole, kept, resolve), resolve(self.tile)
        levels = tuple(sorted(kept))
        if not levels[0] < tile < levels[-1]:
            raise RecipeError(
                f"tile_budget: tile {self.tile:g} is {tile} tokens; allowed are more than the "
                f"fewest and fewer than the most that keep makes vision graphs for, {levels[0]} "
                f"and {levels[-1]}: no tile could differ"
            )
        return TileBudget(whole=whole, tile=tile, levels=levels, by=by)
