"""The stage that leaves out tiles which show nothing, before the tower.

Every tile of a cut picture costs a run of the tower and a run of visual tokens, also where it shows
a margin or the sky. What an empty tile shows is in the whole picture as well, which is always seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.models.images.empty_tiles import MOST_CONTRAST
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import PlanState, Stage, StageResult

if TYPE_CHECKING:
    from pocketvlm.calibration.source import CalibrationSet

__all__ = ["SkipEmptyTiles"]


@dataclass(frozen=True, kw_only=True)
class SkipEmptyTiles(Stage):
    """Leaves out tiles that show a background alone, by their pixels.

    Attributes:
        contrast: Levels, of 255: a tile is empty where no two neighbouring blocks of 8 x 8 pixels
            differ by as much in the mean of any channel.
    """

    # Statistics of visual tokens are those of the tiles that the phone will see.
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized_weights", "quantized_cache"})

    carries_taps: ClassVar[bool] = True

    method: Literal["skip_empty_tiles"] = "skip_empty_tiles"
    contrast: int = 12

    def __post_init__(self) -> None:
        if not 1 <= self.contrast <= MOST_CONTRAST:
            raise ValueError(f"contrast is {self.contrast}; allowed are 1 to {MOST_CONTRAST}")

    def hold(self, spec: ModelSpec) -> None:
        """Refuses models whose tiles cannot be left out.

        Raises:
            RecipeError: Pictures are not cut, or the whole picture does not come with their tiles.
        """
        tiling = spec.tiling
        if tiling is None or tiling.most_tiles == 1:
            raise RecipeError("skip_empty_tiles: this model's pictures are not cut into tiles")
        if not tiling.has_whole:
            raise RecipeError(
                "skip_empty_tiles: the whole picture does not come with this model's tiles, so "
                "that what an empty one shows would be lost; use_thumbnail must be true"
            )

    def plan(self, state: PlanState) -> PlanState:
        """Says that figures are those of pictures without empty tiles."""
        self.hold(state.spec)
        planned = replace(state, spec=replace(state.spec, leaves_tiles_out=True))
        return planned.with_notes(
            f"skip_empty_tiles: tiles and tokens are those of a picture without empty tiles; one "
            f"with a contrast below {self.contrast} costs nothing"
        )

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Changes the settings of the processor; counts the tiles of the calibration set.

        Raises:
            RecipeError: Tiles of this model cannot be left out.
            CalibrationError: A picture cannot be read.
        """
        self.hold(checkpoint.spec)
        processor = checkpoint.processor.with_empty_contrast(self.contrast)
        grids = [grid for sample in calibration.samples for grid in sample.grids(processor)]
        left_out, tiles = (
            sum(len(grid.left_out) for grid in grids),
            sum(grid.all_tiles for grid in grids),
        )
        ctx.report(self.method, 1, 1, f"{left_out} of {tiles} tiles of the calibration set")
        return StageResult(
            checkpoint=replace(
                checkpoint,
                processor=processor,
                spec=replace(checkpoint.spec, leaves_tiles_out=True),
            ),
            is_calibrated=False,
            metrics={"contrast": self.contrast, "left_out": left_out, "of": tiles},
        )
