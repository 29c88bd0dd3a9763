"""The stage that has another rule choose the grid which a picture is cut into.

Models enlarge a picture to fill their tiles, and cut it into more of them than it has pixels for.
Rules of other models take fewer where hardly anything is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.tiling_change import change_tiling
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.models.images.tilings import Anyres, SplitGrid, Tiling
from pocketvlm.models.images.tilings.grid_rules import GridRule, RelaxedRatio
from pocketvlm.stages import PlanState, Stage, StageResult

if TYPE_CHECKING:
    from pocketvlm.calibration.source import CalibrationSet

__all__ = ["ChooseGrid"]

_RELAXED = RelaxedRatio()


@dataclass(frozen=True, kw_only=True)
class ChooseGrid(Stage):
    """Has a rule choose the grid of a picture, of those that the model may have.

    Attributes:
        rule: The rule.
    """

    # Statistics of visual tokens are those of the tiles that the phone will see.
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized_weights", "quantized_cache"})

    carries_taps: ClassVar[bool] = True

    method: Literal["choose_grid"] = "choose_grid"
    rule: GridRule = _RELAXED

    def ruled(self, tiling: Tiling | None) -> SplitGrid | Anyres:
        """The tiling with the rule.

        Raises:
            RecipeError: Pictures are not cut, or the library's class cuts them by their size alone.
        """
        if tiling is None or tiling.most_tiles == 1:
            raise RecipeError("choose_grid: this model's pictures are not cut into tiles")
        if not isinstance(tiling, SplitGrid | Anyres):
            raise RecipeError(
                "choose_grid: this model's image processor cannot be told the grid of a picture; "
                "those of Idefics3, SmolVLM, LLaVA-NeXT and LLaVA-OneVision can"
            )
        if isinstance(tiling, SplitGrid) and not isinstance(tiling.first, int):
            raise RecipeError(
                "choose_grid: size names height and width, so that every picture has one grid; "
                "with longest_edge a rule can choose"
            )
        return replace(tiling, rule=self.rule)

    def plan(self, state: PlanState) -> PlanState:
        """Leaves the tiles that the rule chooses."""
        return replace(state, spec=replace(state.spec, tiling=self.ruled(state.spec.tiling)))

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Changes the settings of the processor; counts the tiles of the calibration set.

        Raises:
            RecipeError: As `ruled`.
            CalibrationError: A picture cannot be read.
        """
        tiling = self.ruled(checkpoint.spec.tiling)
        done = change_tiling(self.method, tiling, checkpoint, calibration, ctx)
        return replace(done, metrics={"rule": self.rule.kind, **done.metrics})
