"""The stage that cuts pictures by a second grid as well, as Mini-Monkey does.

What the cuts of one grid divide, a word or a face, is whole in a tile of another grid. That costs
more tiles, not fewer, and a model that has learned from one grid has not learned from two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.tiling_change import change_tiling
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.models.images.tilings import AspectGrid, SecondGrid, Tiling
from pocketvlm.stages import PlanState, Stage, StageResult

if TYPE_CHECKING:
    from pocketvlm.calibration.source import CalibrationSet

__all__ = ["AddGrid"]


@dataclass(frozen=True, kw_only=True)
class AddGrid(Stage):
    """Cuts pictures by a second grid as well, whose cuts are elsewhere.

    Attributes:
        fewest: Tiles of the smallest grids that are considered.
        most: Tiles of the largest.
    """

    # Statistics of visual tokens are those of the tiles that the phone will see.
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized_weights", "quantized_cache"})

    carries_taps: ClassVar[bool] = True

    method: Literal["add_grid"] = "add_grid"
    fewest: int = 3
    most: int = 7

    def __post_init__(self) -> None:
        SecondGrid(fewest=self.fewest, most=self.most)

    def doubled(self, tiling: Tiling | None) -> AspectGrid:
        """The tiling with a second grid.

        Raises:
            RecipeError: Pictures are not cut, or not as InternVL cuts them.
        """
        if tiling is None or tiling.most_tiles == 1:
            raise RecipeError("add_grid: this model's pictures are not cut into tiles")
        if not isinstance(tiling, AspectGrid):
            raise RecipeError(
                "add_grid: this model's prompts name the place of a tile in one grid, or make one "
                "map of all tiles; those of InternVL do not"
            )
        return replace(tiling, second=SecondGrid(fewest=self.fewest, most=self.most))

    def plan(self, state: PlanState) -> PlanState:
        """Adds the tiles of the second grid."""
        tiling = self.doubled(state.spec.tiling)
        return replace(state, spec=replace(state.spec, tiling=tiling)).with_notes(
            "add_grid: adds tiles, and so runs of the tower and tokens; a model that was not "
            "trained with two grids may answer worse"
        )

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Changes the settings of the processor; counts the tiles of the calibration set.

        Raises:
            RecipeError: As `doubled`.
            CalibrationError: A picture cannot be read.
        """
        tiling = self.doubled(checkpoint.spec.tiling)
        return change_tiling(self.method, tiling, checkpoint, calibration, ctx)
