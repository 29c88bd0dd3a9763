"""Tiles that show more get more tokens, by the detail of their pixels, before the tower runs.

The measure is ours: the mean step between the means of neighbouring blocks of 8 x 8 pixels
(`models.images.tile_tokens`). It knows nothing of what matters, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pocketvlm.bundle import TileBudget
from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.compress.tokens.tile_budgets.kind import Resolve
from pocketvlm.compress.tokens.tile_budgets.shared import SharedBudget
from pocketvlm.models.spec import ModelSpec

__all__ = ["Detail"]


@dataclass(frozen=True, kw_only=True)
class Detail(SharedBudget):
    """Shares tokens among tiles by the detail of their pixels."""

    kind: Literal["detail"] = "detail"

    def plan(
        self, spec: ModelSpec, kept: Sequence[int], reducer: Reducer, resolve: Resolve
    ) -> TileBudget:
        """The budget of one model."""
        return self._shared(spec, kept, resolve, by="detail")
