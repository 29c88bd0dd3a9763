"""The stage that drops visual tokens inside the decoder, and the one table of its schedules.

A new kind of schedule is one module beside these and one line in `AnySchedule`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Literal

from pocketvlm.bundle import VisualSchedule
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.schedule.exit import Exit
from pocketvlm.compress.tokens.schedule.fast_v import FastV
from pocketvlm.compress.tokens.schedule.g_search import GSearch
from pocketvlm.compress.tokens.schedule.listed import Listed
from pocketvlm.compress.tokens.schedule.p_sigmoid import PSigmoid
from pocketvlm.compress.tokens.schedule.progressive import Progressive
from pocketvlm.compress.tokens.schedule.pyramid_drop import PyramidDrop
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import PlanState, Stage, StageResult

__all__ = ["AnySchedule", "DropTokens"]

AnySchedule = Exit | FastV | PyramidDrop | Progressive | Listed | GSearch | PSigmoid
"""Everything that a recipe may name as `schedule`."""

_EXIT = Exit()
_FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class DropTokens(Stage):
    """Runs ever fewer visual tokens through the layers of the decoder.

    Attributes:
        schedule: After which layers how many are left.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"float_weights"})
    provides: ClassVar[frozenset[str]] = frozenset({"ended_tokens"})
    # A quantizer must see the rows that the phone will run, so it comes later.
    forbids: ClassVar[frozenset[str]] = frozenset(
        {"ended_tokens", "quantized_weights", "quantized_cache"}
    )

    method: Literal["drop_tokens"] = "drop_tokens"
    schedule: AnySchedule = _EXIT

    def plan(self, state: PlanState) -> PlanState:
        """Drops visual tokens; all layers run them where calibration decides where they end.

        Raises:
            RecipeError: The schedule does not fit the decoder, or the decoder has masks, bounded
                scores, or layers of two kinds.
        """
        _require_plain_decoder(state.spec)
        try:
            schedule, notes = self.schedule.planned(state)
        except ValueError as error:
            raise RecipeError(f"drop_tokens: {error}") from error
        if not self.schedule.is_searched:
            _require_fit(schedule, state.spec)
        return replace(state, visual_schedule=schedule).with_notes(*notes)

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Gives the checkpoint its schedule; the weights stay as they are.

        Raises:
            RecipeError: Tokens are dropped already, the schedule does not suit the model, or a
                search finds none.
            CalibrationError: A search needs samples with answers, and one cannot be used.
        """
        if checkpoint.visual_schedule is not None:
            raise RecipeError(
                "drop_tokens: visual tokens are dropped inside the decoder already; a checkpoint "
                "gets one schedule"
            )
        spec = checkpoint.spec
        _require_plain_decoder(spec)
        try:
            found = self.schedule.find(checkpoint, calibration, ctx)
        except ValueError as error:
            raise RecipeError(f"drop_tokens: {error}") from error
        schedule, depth = found.schedule, spec.decoder.depth
        _require_fit(schedule, spec)
        tokens = checkpoint.visual_tokens
        rows = schedule.rows_by_layer(depth, tokens)
        row_bytes = 2 * spec.decoder.kv_heads * spec.decoder.head_dim * _FLOAT_BYTES
        ctx.report(self.method, 1, 1, schedule.describe())
        return StageResult(
            checkpoint=replace(checkpoint, visual_schedule=schedule),
            is_calibrated=self.schedule.is_searched,
            layers=found.layers,
            metrics={
                "schedule": asdict(schedule),
                "visual_tokens_by_layer": list(rows),
                "mean_kept_share": sum(rows) / (depth * tokens),
                "cache_bytes_per_tile": sum(rows) * row_bytes,
                "cache_bytes_per_tile_before": depth * tokens * row_bytes,
                **found.metrics,
            },
        )


def _require_fit(schedule: VisualSchedule, spec: ModelSpec) -> None:
    if schedule.positions == "consecutive" and spec.position_grid is not None:
        raise RecipeError(
            "drop_tokens: positions are rows and columns of a picture in this model, which cannot "
            "be recounted; allowed is original"
        )
    try:
        schedule.require_depth(spec.decoder.depth)
    except ValueError as error:
        raise RecipeError(f"drop_tokens: {error}") from error


def _require_plain_decoder(spec: ModelSpec) -> None:
    """Refuses decoders whose rows see others once visual rows are gone, or cannot be left out."""
    decoder = spec.decoder
    if decoder.convolutions:
        raise RecipeError(
            f"drop_tokens: {len(decoder.convolutions)} of the decoder's {decoder.depth} layers "
            "have a short convolution instead of attention, which drop_tokens does not support; "
            "reduce_tokens, prune and every quantizer work on such layers"
        )
    if decoder.has_masks:
        raise RecipeError(
            "drop_tokens: rows of this decoder see later rows or a window of the past, and without "
            "visual rows they would see others; allowed are decoders whose rows all see the past"
        )
    if decoder.score_softcap is not None:
        raise RecipeError(
            "drop_tokens: this decoder bounds its attention scores, which ranking does not support"
        )
