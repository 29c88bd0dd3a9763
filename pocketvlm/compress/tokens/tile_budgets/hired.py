"""HiRED: tiles share a budget by what the whole picture, seen first, says of them.

HiRED (arXiv 2408.10945, section 4.1): the visual content of a tile is what [CLS] pays to the tokens
of its region in the whole picture, and a tile gets its share of the budget by it. Here it is the
number of the whole picture's kept tokens whose middle lies in the tile, which the official code
counts as well; its regions are bands of rows, ours are the tiles. So any reduction that chooses
tokens can say it, with or without [CLS], and no graph needs another output. What is done otherwise:
tokens are ranked by the reduction itself and not by an early layer (the paper's ablation prefers
layer 0 for budgets), and numbers are those that there are vision graphs for, shared out by
`share_out` instead of floors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pocketvlm.bundle import TileBudget
from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.compress.tokens.tile_budgets.kind import Resolve
from pocketvlm.compress.tokens.tile_budgets.shared import SharedBudget
from pocketvlm.errors import RecipeError
from pocketvlm.models.spec import ModelSpec

__all__ = ["Hired"]


@dataclass(frozen=True, kw_only=True)
class Hired(SharedBudget):
    """Shares tokens among tiles by how many of the whole picture's kept ones show each."""

    kind: Literal["hired"] = "hired"

    def plan(
        self, spec: ModelSpec, kept: Sequence[int], reducer: Reducer, resolve: Resolve
    ) -> TileBudget:
        """The budget of one model."""
        budget = self._shared(spec, kept, resolve, by="whole_tokens")
        if not reducer.looks_at_pictures:
            raise RecipeError(
                f"tile_budget: hired asks which tokens of the whole picture are kept, and "
                f"{reducer.kind} keeps the same of every picture; use a reducer that ranks them, "
                "or whole_finer or detail"
            )
        if budget.whole == spec.visual_tokens:
            raise RecipeError(
                f"tile_budget: hired asks which tokens of the whole picture are kept, and whole "
                f"keeps all {budget.whole}; allowed are fewer"
            )
        return budget
