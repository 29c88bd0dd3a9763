"""What the kinds of tile budgets share: the numbers of tokens that a recipe names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt

from pocketvlm.bundle import TileBudget
from pocketvlm.compress.tokens.keep import require_keep
from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.errors import RecipeError
from pocketvlm.models.spec import ModelSpec

__all__ = ["TileBudgetKind"]

Resolve = Callable[[float], int]
"""From a share or a number of tokens to a number that a reducer can leave of a model's."""


@dataclass(frozen=True, kw_only=True)
class TileBudgetKind(ABC):
    """A way to give the tiles of a picture different numbers of tokens: its own configuration.

    Attributes:
        whole: Tokens of the whole picture, a share or a number; one of those that are kept.
        tile: Tokens of a tile, likewise.
    """

    whole: float | int
    tile: float | int

    def __post_init__(self) -> None:
        require_keep("whole", self.whole)
        require_keep("tile", self.tile)

    @property
    @abstractmethod
    def kind(self) -> str:
        """The tag that names it in a recipe."""

    @abstractmethod
    def plan(
        self, spec: ModelSpec, kept: Sequence[int], reducer: Reducer, resolve: Resolve
    ) -> TileBudget:
        """The budget of one model.

        Args:
            spec: The model.
            kept: Numbers of tokens that there are vision graphs for.
            reducer: What chooses tokens.
            resolve: From what the recipe names to numbers.

        Raises:
            RecipeError: It does not suit the model, or there is no vision graph for a number.
        """

    def _require_tiles(self, spec: ModelSpec) -> None:
        """Refuses models whose pictures are not cut, or not shown as a whole as well."""
        tiling = spec.tiling
        if tiling is None or tiling.most_tiles == 1:
            raise RecipeError("tile_budget: this model's pictures are not cut into tiles")
        if not tiling.has_whole:
            raise RecipeError(
                "tile_budget: the whole picture does not come with this model's tiles; "
                "use_thumbnail must be true"
            )
        if isqrt(spec.visual_tokens) ** 2 != spec.visual_tokens:
            raise RecipeError(
                f"tile_budget: a tile has {spec.visual_tokens} tokens, which are not a square map"
            )

    def _graph_of(self, name: str, wanted: float, kept: Sequence[int], resolve: Resolve) -> int:
        """The number of tokens that an option names, which there must be a vision graph for."""
        count = resolve(wanted)
        if count not in kept:
            raise RecipeError(
                f"tile_budget: {name} {wanted:g} is {count} tokens, and keep makes vision graphs "
                f"for {', '.join(map(str, kept))}"
            )
        return count
