"""What is known of a model between two stages before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pocketvlm.bundle import TileBudget, VisionVariant, VisualSchedule
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import PrefillTimes
from pocketvlm.models.images.tilings.tile_grid import TileGrid
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.picture_size import PictureSize
from pocketvlm.models.spec import ModelSpec
from pocketvlm.weights.layout import LayerBytes, SparseLayout, WeightLayout, plan_behind_mask

__all__ = ["FLOAT_CACHE_BITS", "PlanState", "PlannedVision"]

FLOAT_CACHE_BITS = 32
"""Bits of a number in a KV cache that no stage quantizes."""


@dataclass(frozen=True, kw_only=True)
class PlannedVision:
    """One vision graph.

    Attributes:
        size: Pictures that it takes.
        visual_tokens: Tokens of a tile that it leaves.
    """

    size: PictureSize
    visual_tokens: int


@dataclass(frozen=True, kw_only=True)
class PlanState:
    """The model as the stages so far will leave it.

    Attributes:
        spec: Its specification.
        layouts: How each weight matrix will be stored; `None` for those that stay float.
        visual_tokens: Tokens of an image that enter the decoder.
        other_vision: Vision graphs beside the one for `spec` and `visual_tokens`.
        tile_budget: Which of them sees which tile of a picture; `None` where the first sees all.
        visual_schedule: Where visual rows leave the decoder; `None` where no stage drops them.
            Where only calibration will tell, the longest that it may be.
        cache_bits: Bits of a number in the KV cache.
        notes: What a reader of the plan should know.
        layer_bytes: What a layer takes in the files of each target, by the target's tag.
        prefill_times: What prefill takes; `None` where what will be exported is not known.
    """

    spec: ModelSpec
    layouts: Mapping[LinearSpec, WeightLayout | None]
    visual_tokens: int
    other_vision: tuple[PlannedVision, ...] = ()
    tile_budget: TileBudget | None = None
    visual_schedule: VisualSchedule | None = None
    cache_bits: int = FLOAT_CACHE_BITS
    notes: tuple[str, ...] = ()
    layer_bytes: Mapping[str, LayerBytes] = field(default_factory=dict)
    prefill_times: PrefillTimes | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        layer_bytes: Mapping[str, LayerBytes] | None = None,
        prefill_times: PrefillTimes | None = None,
    ) -> PlanState:
        """The model before the first stage, and what it would take in files and in time."""
        return cls(
            spec=spec,
            layouts=dict.fromkeys(spec.linears()),
            visual_tokens=spec.visual_tokens,
            layer_bytes=layer_bytes or {},
            prefill_times=prefill_times,
        )

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> PlanState:
        """The model as the stages before have left it."""
        spec, grid = checkpoint.spec, checkpoint.cache_grid
        return cls(
            spec=spec,
            layouts={linear: form.layout for linear, form in checkpoint.forms().items()},
            visual_tokens=checkpoint.visual_tokens,
            other_vision=tuple(
                PlannedVision(size=sight.size, visual_tokens=own.visual_tokens)
                for sight, own in zip(
                    checkpoint.other_vision, checkpoint.each_vision()[1:], strict=True
                )
            ),
            tile_budget=checkpoint.tile_budget,
            visual_schedule=checkpoint.visual_schedule,
            cache_bits=FLOAT_CACHE_BITS if grid is None else grid.bits,
        )

    @property
    def counted_schedule(self) -> VisualSchedule | None:
        """The schedule that is counted with; `None` where every layer may run all rows."""
        schedule = self.visual_schedule
        if schedule is None or schedule.drops[-1].layers >= self.spec.decoder.depth:
            return None
        return schedule

    @property
    def vision_variant(self) -> VisionVariant:
        """The vision graph for `spec` and `visual_tokens`, as a manifest describes it."""
        return self.spec.vision_variant(self.visual_tokens)

    def each_vision(self) -> tuple[PlanState, ...]:
        """The state with each of its vision graphs alone, its own first."""
        others = (
            replace(
                self,
                spec=self.spec.with_picture_size(vision.size.height, vision.size.width),
                visual_tokens=vision.visual_tokens,
                other_vision=(),
                tile_budget=None,
            )
            for vision in self.other_vision
        )
        return (replace(self, other_vision=(), tile_budget=None), *others)

    def most_rows(self, grid: TileGrid) -> int:
        """Rows of the decoder that a picture takes, at most."""
        full, budget = self.spec.visual_tokens, self.tile_budget
        if budget is None:
            return grid.most_rows(full, self.visual_tokens)
        return grid.most_rows(full, budget.tile, budget.whole)

    def with_spec(self, spec: ModelSpec) -> PlanState:
        """The same with other layers; a layer that changes its shape is float again."""
        return replace(
            self,
            spec=spec,
            layouts={linear: self.layouts.get(linear) for linear in spec.linears()},
        )

    def with_layouts(self, changed: Mapping[LinearSpec, WeightLayout | None]) -> PlanState:
        """The same with some layers compressed, under their masks where they have one.

        Args:
            changed: New layouts; a layer with `None` keeps the layout that it has.

        Raises:
            RecipeError: Elements of a layout cannot be stored one by one under a mask.
        """
        layouts = dict(self.layouts)
        for linear, found in changed.items():
            if found is None:
                continue
            before = layouts[linear]
            if isinstance(before, SparseLayout):
                layouts[linear] = plan_behind_mask(linear.name, before, found)
            else:
                layouts[linear] = found
        return replace(self, layouts=layouts)

    def with_notes(self, *notes: str) -> PlanState:
        """The same with more to say."""
        return replace(self, notes=(*self.notes, *notes))
