"""The stage that chooses the size of pictures, for models that take any.

Their own processors keep a picture's ratio and about its size, so that every picture has another
number of visual tokens; a graph for a phone has one. Pictures are resized to it, whatever their
ratio; a bundle may hold several graphs, for several sizes. A size costs a token for every cell of
patches that are merged, and attention their square.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pocketvlm.checkpoint import Checkpoint, Vision
from pocketvlm.context import RunContext
from pocketvlm.errors import CheckpointError, RecipeError
from pocketvlm.models.picture_size import PictureSize
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import PlannedVision, PlanState, Stage, StageResult

if TYPE_CHECKING:
    from pocketvlm.calibration.source import CalibrationSet

__all__ = ["SetResolution"]


@dataclass(frozen=True, kw_only=True)
class SetResolution(Stage):
    """Chooses the sizes that pictures are fitted to, where the model takes any.

    Attributes:
        height: Pixels from top to bottom; a multiple of the pixels of a visual token, and of a
            window where the tower attends within windows.
        width: Pixels from left to right, likewise.
        also: Other sizes, each with a vision graph of its own over the same weights; a picture is
            fitted to the one that is closest to its ratio of sides.
    """

    # Statistics of visual tokens are those of the pictures that the phone will see.
    forbids: ClassVar[frozenset[str]] = frozenset(
        {"quantized_weights", "quantized_cache", "reduced_tokens", "merged_tokens"}
    )

    carries_taps: ClassVar[bool] = True

    method: Literal["set_resolution"] = "set_resolution"
    height: int = 448
    width: int = 448
    also: tuple[PictureSize, ...] = ()

    def __post_init__(self) -> None:
        sizes = self.sizes
        if len(set(sizes)) < len(sizes):
            raise ValueError(f"also names a size twice; {', '.join(map(str, sizes))} must differ")

    @property
    def sizes(self) -> tuple[PictureSize, ...]:
        """All sizes, the one that the model is calibrated with first."""
        return (PictureSize(height=self.height, width=self.width), *self.also)

    def resized(self, spec: ModelSpec, size: PictureSize) -> ModelSpec:
        """The model for pictures of a size.

        Raises:
            RecipeError: It takes one size alone, or this one does not fit it.
        """
        tower = spec.tower
        if (tower.height, tower.width) == (size.height, size.width):
            return spec
        if not tower.takes_any_size:
            raise RecipeError(
                f"set_resolution: this model's pictures are {tower.width} x {tower.height} pixels; "
                "it takes no other size"
            )
        try:
            return spec.with_picture_size(size.height, size.width)
        except CheckpointError as error:
            raise RecipeError(f"set_resolution: {str(error).partition(': ')[2]}") from error

    def plan(self, state: PlanState) -> PlanState:
        """Counts the visual tokens of each size."""
        spec, *others = (self.resized(state.spec, size) for size in self.sizes)
        return replace(
            state,
            spec=spec,
            visual_tokens=spec.visual_tokens,
            other_vision=tuple(
                PlannedVision(size=size, visual_tokens=other.visual_tokens)
                for size, other in zip(self.also, others, strict=True)
            ),
        )

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Has the processor fit pictures to the sizes."""
        before = checkpoint.spec
        spec, *others = (self.resized(before, size) for size in self.sizes)
        if spec is not before:
            processor = checkpoint.processor.with_picture_size(self.height, self.width)
            checkpoint = replace(checkpoint, processor=processor, spec=spec)
        checkpoint = replace(
            checkpoint, other_vision=tuple(Vision(size=size) for size in self.also)
        )
        tokens = [each.visual_tokens for each in (spec, *others)]
        ctx.report(self.method, 1, 1, f"{' or '.join(map(str, tokens))} tokens per picture")
        return StageResult(
            checkpoint=checkpoint,
            is_calibrated=False,
            metrics={
                "visual_tokens": spec.visual_tokens,
                "before": before.visual_tokens,
                **({"each": tokens} if others else {}),
            },
        )
