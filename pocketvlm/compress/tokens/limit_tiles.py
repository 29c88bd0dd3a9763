"""The stage that cuts pictures into fewer tiles.

Models that split large pictures spend most of their prompt on tiles: SmolVLM's settings make 13 of
a photo. Their authors name the knobs themselves: a shorter `size.longest_edge` in whole tiles, a
smaller `max_patches`, or fewer `image_grid_pinpoints`. What is left is an ordinary processor of the
family, which stock transformers follows as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.models.images.tilings import Tiling
from pocketvlm.models.images.tilings.anyres import Anyres
from pocketvlm.stages import PlanState, Stage, StageResult

if TYPE_CHECKING:
    from pocketvlm.calibration.source import CalibrationSet

__all__ = ["LimitTiles"]


@dataclass(frozen=True, kw_only=True)
class LimitTiles(Stage):
    """Limits the tiles of a picture.

    Attributes:
        max_tiles: Tiles that a picture may become, the whole picture counted as one; 5 are two
            rows of two and the whole, 1 is the whole alone.
    """

    # Statistics of visual tokens are those of the tiles that the phone will see.
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized_weights", "quantized_cache"})

    carries_taps: ClassVar[bool] = True

    method: Literal["limit_tiles"] = "limit_tiles"
    max_tiles: int = 5

    def __post_init__(self) -> None:
        if self.max_tiles < 1:
            raise ValueError(f"max_tiles is {self.max_tiles}; at least 1 is needed")

    def limited(self, tiling: Tiling | None) -> Tiling | None:
        """The tiling with no more tiles; `None` where nothing has to change.

        Raises:
            RecipeError: Every picture of the model is cut into more.
        """
        try:
            limited = None if tiling is None else tiling.limited(self.max_tiles)
        except ValueError as error:
            raise RecipeError(f"limit_tiles: max_tiles is {self.max_tiles}; {error}") from error
        return None if limited == tiling else limited

    def plan(self, state: PlanState) -> PlanState:
        """Leaves fewer tiles."""
        tiling = self.limited(state.spec.tiling)
        if tiling is None:
            return state.with_notes(self._unchanged(state.spec.tiling))
        return replace(state, spec=replace(state.spec, tiling=tiling))

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Changes the settings of the processor."""
        before = checkpoint.spec.tiling
        tiling = self.limited(before)
        tiles = 1 if before is None else before.most_tiles
        after = tiles if tiling is None else tiling.most_tiles
        if tiling is not None:
            # Such a model puts rows of tiles in their order itself.
            stated = tiling.settings if isinstance(tiling, Anyres) else {}
            checkpoint = replace(
                checkpoint,
                processor=checkpoint.processor.with_tiling(tiling),
                config={**checkpoint.config, **stated},
                spec=replace(checkpoint.spec, tiling=tiling),
            )
        ctx.report(self.method, 1, 1, f"{after} of {tiles} tiles")
        return StageResult(
            checkpoint=checkpoint,
            is_calibrated=False,
            metrics={"max_tiles": after, "of": tiles},
            notes=(self._unchanged(before),) if tiling is None else (),
        )

    def _unchanged(self, tiling: Tiling | None) -> str:
        tiles = 1 if tiling is None else tiling.most_tiles
        return f"limit_tiles: a picture becomes {tiles} of at most {self.max_tiles} tiles already"
