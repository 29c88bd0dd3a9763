"""All visual tokens leave the decoder before its last layer.

Lazy layer dropping of YOPO (Zhang et al., arXiv 2410.06169). What differs: there, visual keys are
masked after the softmax and the rest is not normalized again, and everything is still computed;
here visual rows end after the attention of layer L_v - 1, so that later layers neither compute nor
cache them, and attention there is what it is without them. The published L_v is half of the
decoder. It can also be found by what the answers lose (what DyVTE, arXiv 2411.19628, trains a
router to tell per question, here once for all of them), or by YOPO's rule for inactive heads, in
the one form of it that saves time: where every KV group of every later layer is inactive, these
layers need no visual rows at all. A group that is inactive beside active ones saves nothing in a
cache that is rectangular, and stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pocketvlm.bundle import VisualSchedule
from pocketvlm.calibration.gradients.visual_use import LayerUse, measure_visual_use
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.schedule.kind import (
    FoundSchedule,
    ScheduleKind,
    check_share,
    share_of,
)
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError

__all__ = ["Exit", "InactiveGroups", "LowDivergence"]

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
            f"drop_tokens: the answers change by {min(found):.3g} nats at the least, wherever "
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
                "drop_tokens: the last layer has KV groups whose ratio is not below "
                f"{self.ratio:g} in more than {self.share:.0%} of the samples: none can be skipped"
            )
        return layers


@dataclass(frozen=True, kw_only=True)
class Exit(ScheduleKind):
    """Runs visual tokens through the first layers of the decoder only.

    Attributes:
        first_layers: How many these are: a share of the layers (a float in (0, 1), rounded to the
            nearest count), or their number (an integer). `None` leaves it to `rule`.
        rule: How their number is found on the calibration samples; `None` for none, and then half
            of the layers unless `first_layers` says otherwise.
    """

    kind: Literal["exit"] = "exit"
    first_layers: float | int | None = None
    rule: LowDivergence | InactiveGroups | None = None

    def __post_init__(self) -> None:
        if self.first_layers is not None and self.rule is not None:
            raise ValueError("first_layers and rule are both given; allowed is one of them")
        check_share("first_layers", self.first_layers, "layers")

    @property
    def is_searched(self) -> bool:
        """Whether a rule finds the layer."""
        return self.rule is not None

    def plan(self, depth: int, tokens: int) -> VisualSchedule:
        """The exit, after all layers where a rule will find it."""
        del tokens
        if self.rule is not None:
            return VisualSchedule.ending(depth)
        given = _PUBLISHED_SHARE if self.first_layers is None else self.first_layers
        return VisualSchedule.ending(share_of(given, depth))

    def find(
        self, checkpoint: Checkpoint, samples: CalibrationSet, ctx: RunContext
    ) -> FoundSchedule:
        """The exit that the rule finds, if there is one."""
        if self.rule is None:
            return super().find(checkpoint, samples, ctx)
        uses = measure_visual_use(
            checkpoint,
            samples,
            lambda done, total: ctx.report("drop_tokens", done, total, "steps of the search"),
        )
        layers = self.rule.choose(uses)
        return FoundSchedule(
            schedule=VisualSchedule.ending(layers),
            layers=tuple(_row(number, use, layers) for number, use in enumerate(uses)),
        )


def _row(number: int, use: LayerUse, layers: int) -> dict[str, Any]:
    """What was measured of a layer, for the report."""
    return {
        "name": f"decoder layer {number}",
        "block": number,
        "method": "drop_tokens",
        "runs_visual": number < layers,
        "visual_ratio_by_group": [float(ratio) for ratio in use.ratios.mean(dim=0)],
        "divergence_if_last": use.divergence,
    }
