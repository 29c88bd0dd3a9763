"""The stage that merges tokens inside the vision tower.

`reduce_tokens` makes the decoder faster and leaves the tower as slow as it was; where a tower of
1,024 patches feeds 64 tokens to a small decoder, the tower is what a picture costs. Here every
block after the first merges runs on fewer tokens. After the tower each patch gets the feature of
the token that it became part of, so that the projector, `reduce_tokens` and the prompt see as many
visual tokens as before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.tower.mergers import AnyMerger, MergeSimilar
from pocketvlm.context import RunContext
from pocketvlm.errors import CheckpointError, RecipeError
from pocketvlm.models.spec import ModelSpec
from pocketvlm.models.token_merging import TokenMerge
from pocketvlm.models.tower import TowerSpec
from pocketvlm.stages import PlanState, Stage, StageResult

if TYPE_CHECKING:
    from pocketvlm.calibration.source import CalibrationSet

__all__ = ["MergeTokens"]

_SIMILAR = MergeSimilar()


@dataclass(frozen=True, kw_only=True)
class MergeTokens(Stage):
    """Merges tokens of the vision tower, after the attention of one block or of several.

    Attributes:
        merger: Which tokens become one.
        keep: Patches that remain in the end: a share (a float in (0, 1), rounded to the nearest
            number that the merger can leave), or their number (an integer).
        first_block: The first block that merges; the first of the tower is 0.
        blocks: Over how many blocks, in equal numbers.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"merged_tokens"})
    # A quantizer must see the tokens that the phone will run, so it comes later.
    forbids: ClassVar[frozenset[str]] = frozenset(
        {"merged_tokens", "quantized_weights", "quantized_cache"}
    )

    method: Literal["merge_tokens"] = "merge_tokens"
    merger: AnyMerger = _SIMILAR
    keep: float | int = 0.5
    first_block: int = 0
    blocks: int = 2

    def __post_init__(self) -> None:
        is_count = isinstance(self.keep, int) and not isinstance(self.keep, bool)
        if is_count and self.keep < 1:
            raise ValueError(f"keep is {self.keep}; a count is at least 1")
        if not is_count and not (isinstance(self.keep, float) and 0 < self.keep < 1):
            raise ValueError(
                f"keep is {self.keep!r}; allowed are a share between 0 and 1 or a whole number of "
                "patches"
            )
        if self.first_block < 0:
            raise ValueError(f"first_block is {self.first_block}; allowed are blocks from 0")
        if self.blocks < 1:
            raise ValueError(f"blocks is {self.blocks}; at least 1 is needed")

    def merges(self, tower: TowerSpec) -> tuple[TokenMerge, ...]:
        """What is merged where."""
        keep = (
            self.keep
            if isinstance(self.keep, int)
            else self.merger.nearest_count(tower, max(1, round(self.keep * tower.patches)))
        )
        leave = tower.patches - keep
        return tuple(
            self.merger.merge(
                tower, self.first_block + step, tower.patches - leave * (step + 1) // self.blocks
            )
            for step in range(self.blocks)
        )

    def merged(self, spec: ModelSpec) -> ModelSpec:
        """The model with these merges.

        Raises:
            RecipeError: Its tower cannot merge tokens so.
        """
        try:
            return spec.with_token_merges(self.merges(spec.tower))
        except CheckpointError as error:
            raise RecipeError(f"merge_tokens: {error}") from error

    def plan(self, state: PlanState) -> PlanState:
        """Leaves fewer patches on the way."""
        return replace(state, spec=self.merged(state.spec))

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Gives the tower its merges; the weights stay as they are.

        Raises:
            RecipeError: The tower cannot merge tokens so, or does so already.
        """
        if checkpoint.spec.tower.merges:
            raise RecipeError("merge_tokens: this tower merges tokens already; it does so once")
        spec = self.merged(checkpoint.spec)
        patches, merges = spec.tower.patches, spec.tower.merges
        ctx.report(self.method, 1, 1, f"{merges[-1].patches} of {patches} patches")
        return StageResult(
            checkpoint=replace(checkpoint, spec=spec),
            is_calibrated=False,
            metrics={
                "merger": self.merger.kind,
                "patches": merges[-1].patches,
                "of": patches,
                "patches_after_blocks": {str(merge.block): merge.patches for merge in merges},
            },
        )
