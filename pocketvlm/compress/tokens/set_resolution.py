"""The stage that chooses the size of pictures, for models that take any.

Their own processors keep a picture's ratio and about its size, so that every picture has another
number of visual tokens; a graph for a phone has one. Pictures are resized to it, whatever their
ratio. The size costs a token for every cell of patches that are merged, and attention their square.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import CheckpointError, RecipeError
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import PlanState, Stage, StageResult

if TYPE_CHECKING:
    from pocketvlm.calibration.source import CalibrationSet

__all__ = ["SetResolution"]


@dataclass(frozen=True, kw_only=True)
class SetResolution(Stage):
    """Chooses the one size that pictures are fitted to, where the model takes any.

    Attributes:
        height: Pixels from top to bottom; a multiple of the pixels of a visual token, and of a
            window where the tower attends within windows.
        width: Pixels from left to right, likewise.
    """

    # Statistics of visual tokens are those of the pictures that the phone will see.
    forbids: ClassVar[frozenset[str]] = frozenset(
        {"quantized_weights", "quantized_cache", "reduced_tokens"}
    )

    carries_taps: ClassVar[bool] = True

    method: Literal["set_resolution"] = "set_resolution"
    height: int = 448
    width: int = 448

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ValueError(
                f"height and width are {self.height} and {self.width}; at least 1 is needed"
            )

    def resized(self, spec: ModelSpec) -> ModelSpec:
        """The model for pictures of this size.

        Raises:
            RecipeError: It takes one size alone, or this one does not fit it.
        """
        tower = spec.tower
        if (tower.height, tower.width) == (self.height, self.width):
            return spec
        if not tower.takes_any_size:
            raise RecipeError(
                f"set_resolution: this model's pictures are {tower.width} x {tower.height} pixels; "
                "it takes no other size"
            )
        try:
            return spec.with_picture_size(self.height, self.width)
        except CheckpointError as error:
            raise RecipeError(f"set_resolution: {str(error).partition(': ')[2]}") from error

    def plan(self, state: PlanState) -> PlanState:
        """Counts the visual tokens of the size."""
        spec = self.resized(state.spec)
        return replace(state, spec=spec, visual_tokens=spec.visual_tokens)

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Has the processor fit pictures to the size."""
        before = checkpoint.spec
        spec = self.resized(before)
        if spec is not before:
            processor = checkpoint.processor.with_picture_size(self.height, self.width)
            checkpoint = replace(checkpoint, processor=processor, spec=spec)
        ctx.report(self.method, 1, 1, f"{spec.visual_tokens} tokens per picture")
        return StageResult(
            checkpoint=checkpoint,
            is_calibrated=False,
            metrics={"visual_tokens": spec.visual_tokens, "before": before.visual_tokens},
        )
