"""Visual tokens leave the decoder before its last layer: less prefill, and a smaller KV cache.

Lazy layer dropping of YOPO (Zhang et al., arXiv 2410.06169). What differs: there, visual keys are
masked after the softmax and the rest is not normalized again, and everything is still computed;
here visual rows end after the attention of layer L_v - 1, so that later layers neither compute nor
cache them, and attention there is what it is without them. The published L_v is half of the
decoder. It can also be found by what the answers lose, or by YOPO's rule for inactive heads, in the
one form of it that saves time: where every KV group of every later layer is inactive, these layers
need no visual rows at all. A group that is inactive beside active ones saves nothing in a cache
that is rectangular, and stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pocketvlm.calibration.gradients.visual_use import LayerUse, measure_visual_use
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.uniform import require_uniform_decoder
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import PlanState, Stage, StageResult

__all__ = ["InactiveGroups", "LowDivergence", "SkipVisual"]

_FLOAT_BYTES = 4
_PUBLISHED_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class LowDivergence:
    """The fewest layers whose answers stay close.

    Attributes:
        limit: Largest mean KL divergence of the answers' next tokens, in nats.
    """

    kind: Literal["divergence"] = "divergence"
    limit: float = 0.02

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"limit is {self.limit!r}; a divergence is allowed above 0")

    def choose(self, uses: Sequence[LayerUse]) -> int:
        """How many layers visual rows run through.

        Raises:
            RecipeError: No number of layers is good enough.
        """
        found = [use.divergence for use in uses if use.divergence is not None]
        for layer, divergence in enumerate(found):
            if divergence <= self.limit:
                return layer + 1
        raise RecipeError(
            f"skip_visual: the answers change by {min(found):.3g} nats at the least, wherever "
            f"visual tokens end before the last layer; rule.limit is {self.limit:g}"
        )


@dataclass(frozen=True, kw_only=True)
class InactiveGroups:
    """All layers up to the last one with a KV group that reads the image.

    A group is inactive in a sample whose attention ratio, visual keys over keys of text, is below
    `ratio`, and inactive for good where that is so in more than `share` of the samples.

    Attributes:
        ratio: The threshold; the paper has 0.035 to 0.2, by model and by how much is cut.
        share: The published 0.4.
    """

    kind: Literal["inactive"] = "inactive"
    ratio: float = 0.1
    share: float = 0.4

    first_candidate: ClassVar[int] = 2  # the first layers are never inactive, as published

    def __post_init__(self) -> None:
        if not self.ratio > 0:
            raise ValueError(f"ratio is {self.ratio!r}; allowed is a ratio above 0")
        if not 0 <= self.share < 1:
            raise ValueError(f"share is {self.share!r}; allowed is a share in [0, 1)")

    def inactive(self, use: LayerUse) -> list[bool]:
        """Which KV groups of a layer are inactive."""
        shares = (use.ratios < self.ratio).double().mean(dim=0)
        return [float(share) > self.share for share in shares]

    def choose(self, uses: Sequence[LayerUse]) -> int:
        """How many layers visual rows run through.

        Raises:
            RecipeError: The last layer has a group that reads the image.
        """
        layers = len(uses)
        while layers > self.first_candidate and all(self.inactive(uses[layers - 1])):
            layers -= 1
        if layers == len(uses):
            raise RecipeError(
                "skip_visual: the last layer has KV groups whose ratio is not below "
                f"{self.ratio:g} in more than {self.share:.0%} of the samples: none can be skipped"
            )
        return layers


@dataclass(frozen=True, kw_only=True)
class SkipVisual(Stage):
    """Runs visual tokens through the first layers of the decoder only.

    Attributes:
        first_layers: How many these are: a share of the layers (a float in (0, 1), rounded to the
            nearest count), or their number (an integer). `None` leaves it to `rule`.
        rule: How their number is found on the calibration samples; `None` for none, and then half
            of the layers unless `first_layers` says otherwise.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"float_weights"})
    provides: ClassVar[frozenset[str]] = frozenset({"ended_tokens"})
    # A quantizer must see the rows that the phone will run, so it comes later.
    forbids: ClassVar[frozenset[str]] = frozenset(
        {"ended_tokens", "quantized_weights", "quantized_cache"}
    )

    method: Literal["skip_visual"] = "skip_visual"
    first_layers: float | int | None = None
    rule: LowDivergence | InactiveGroups | None = None

    def __post_init__(self) -> None:
        given = self.first_layers
        if given is None:
            return
        if self.rule is not None:
            raise ValueError("first_layers and rule are both given; allowed is one of them")
        is_count = isinstance(given, int) and not isinstance(given, bool)
        if is_count and given < 1:
            raise ValueError(f"first_layers is {given}; visual tokens run through at least 1 layer")
        if not is_count and not (isinstance(given, float) and 0 < given < 1):
            raise ValueError(
                f"first_layers is {given!r}; allowed are a share in (0, 1) or a whole number of "
                "layers"
            )

    def plan(self, state: PlanState) -> PlanState:
        """Ends visual tokens early; all layers run them where calibration decides how many.

        Raises:
            RecipeError: The decoder has masks, or layers of two kinds, or these are all its layers.
        """
        require_uniform_decoder(state.spec, self.method)
        _require_no_masks(state.spec)
        if self.rule is None:
            return replace(state, visual_layers=self._visual_layers(state.spec))
        return replace(state, visual_layers=state.spec.decoder.depth).with_notes(
            "skip_visual: how many layers run visual tokens is found on calibration samples; the "
            "KV cache is planned for all of them"
        )

    def _visual_layers(self, spec: ModelSpec) -> int:
        """Layers that visual tokens run through without a rule.

        Raises:
            RecipeError: These are all there are.
        """
        depth = spec.decoder.depth
        given = _PUBLISHED_SHARE if self.first_layers is None else self.first_layers
        layers = given if isinstance(given, int) else max(1, round(given * depth))
        if layers >= depth:
            raise RecipeError(
                f"skip_visual: first_layers {given} leaves none of the decoder's {depth} layers "
                f"without visual tokens; allowed are 1 to {depth - 1}"
            )
        return layers

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Says where visual tokens end; the weights stay as they are.

        Raises:
            RecipeError: Visual tokens end early already, `first_layers` does not suit the model, or
                its rule finds no layer that could be skipped.
            CalibrationError: A rule needs samples with answers, and one cannot be used.
        """
        if checkpoint.visual_layers is not None:
            raise RecipeError(
                f"skip_visual: visual tokens end after {checkpoint.visual_layers} layers already; "
                "a checkpoint is cut once"
            )
        spec = checkpoint.spec
        require_uniform_decoder(spec, self.method)
        _require_no_masks(spec)
        rows: tuple[dict[str, Any], ...] = ()
        if self.rule is not None:
            uses = measure_visual_use(
                checkpoint,
                calibration,
                lambda done, total: ctx.report(self.method, done, total, "layers read"),
            )
            layers = self.rule.choose(uses)
            rows = tuple(_row(number, use, layers) for number, use in enumerate(uses))
        else:
            layers = self._visual_layers(spec)
        depth = spec.decoder.depth
        token_bytes = 2 * spec.decoder.kv_heads * spec.decoder.head_dim * _FLOAT_BYTES
        ctx.report(self.method, 1, 1, f"visual tokens in {layers} of {depth} layers")
        return StageResult(
            checkpoint=replace(checkpoint, visual_layers=layers),
            is_calibrated=bool(rows),
            layers=rows,
            metrics={
                "visual_layers": layers,
                "of": depth,
                "skipped_share": 1 - layers / depth,
                "cache_bytes_per_visual_token": layers * token_bytes,
                "cache_bytes_per_visual_token_before": depth * token_bytes,
            },
        )


def _row(number: int, use: LayerUse, layers: int) -> dict[str, Any]:
    """What was measured of a layer, for the report."""
    return {
        "name": f"decoder layer {number}",
        "block": number,
        "method": "skip_visual",
        "runs_visual": number < layers,
        "visual_ratio_by_group": [float(ratio) for ratio in use.ratios.mean(dim=0)],
        "divergence_if_last": use.divergence,
    }


def _require_no_masks(spec: ModelSpec) -> None:
    if spec.decoder.has_masks:
        raise RecipeError(
            "skip_visual: rows of this decoder see later rows or a window of the past, and without "
            "visual rows they would see others; allowed are decoders whose rows all see the past"
        )
