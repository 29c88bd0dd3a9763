"""What the stages of all calibrated quantizers share: their options, and what they record.

Every layer is compared with its plain form on tokens that it was not fitted to, and the better one
is kept (`layer_quantizer`); the walk is the one of `compress.layerwise.driver`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.driver import LayerwiseRun, compress_layers
from pocketvlm.compress.layerwise.error_feedback import ORDERS, Order
from pocketvlm.compress.layerwise.hessian import ErrorFeedback
from pocketvlm.compress.layerwise.report import describe_calibration
from pocketvlm.compress.quantization.codebook.shared import count_shared_once, share_codebooks
from pocketvlm.compress.quantization.layer_quantizer import LayerQuantizer
from pocketvlm.compress.quantization.layer_report import float_rows
from pocketvlm.compress.quantization.rules import Assignment, LayerRule, assign_layers
from pocketvlm.context import RunContext
from pocketvlm.stages import Stage, StageResult
from pocketvlm.stages.walk_options import WalkOptions, note_synthetic

__all__ = ["CalibratedQuantizer"]

RuleT = TypeVar("RuleT", bound=LayerRule)


@dataclass(frozen=True, kw_only=True)
class CalibratedQuantizer(Stage, WalkOptions):
    """The options of every stage that rounds against Hessians; a subclass says what to round to.

    Attributes:
        damping: Share of a Hessian's mean diagonal that is added to it. Raised tenfold, and
            reported, where the factorization fails.
        order: `group_aware` rounds the most excited columns first without tearing groups apart.
        drift_share: How much of the distance between a layer's input and the float model's is
            made up for (asymmetric calibration, arXiv 2504.02692), from 0 to 1; more than 0 costs
            a second forward pass.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"float_weights"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantized_weights"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized_cache"})
    carries_taps: ClassVar[bool] = True

    damping: float = 0.01
    order: Order = "group_aware"
    drift_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise ValueError(f"damping must lie between 0 and 1, not {self.damping}")
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order!r} is unknown; allowed are {', '.join(ORDERS)}")
        if not 0 <= self.drift_share <= 1:
            raise ValueError(f"drift_share must lie between 0 and 1, not {self.drift_share}")
        self.check_walk_options()

    @property
    def carries_float(self) -> bool:
        """Whether the float model has to run along."""
        return self.drift_share > 0

    @property
    def feedback(self) -> ErrorFeedback:
        """How Hessians are factorized."""
        return ErrorFeedback(damping=self.damping, order=self.order, drift_share=self.drift_share)

    def quantize(
        self,
        checkpoint: Checkpoint,
        calibration: CalibrationSet,
        ctx: RunContext,
        *,
        rules: Sequence[RuleT],
        begin: Callable[[Sequence[Assignment[RuleT]]], LayerQuantizer[RuleT]],
        revised: Callable[[Assignment[RuleT]], bool] = lambda _: False,
    ) -> StageResult:
        """Quantizes the layers that rules choose in place.

        Args:
            checkpoint: The model.
            calibration: The samples.
            ctx: Of the run.
            rules: Ordered rules; the first that matches a layer wins.
            begin: Makes the method from what is to become of the layers, before the first one.
            revised: Whether a layer is given a second form when its sublayer is finished.

        Raises:
            RecipeError: A rule does not fit the model, or a layer is quantized already.
            CalibrationError: A sample cannot be used, or inputs of a layer are not finite.
            CheckpointError: A weight is too large for float16 scales.
        """
        assignments = assign_layers(rules, checkpoint)
        tasks = {item.linear.name: item for item in assignments if item.rule is not None}
        walk = self.walk(checkpoint, calibration, ctx)
        rows = compress_layers(
            checkpoint,
            LayerwiseRun(
                title=self.method,
                tasks=tasks,
                begin=lambda: begin(tuple(tasks.values())),
                walk=walk,
                revised=frozenset(name for name, item in tasks.items() if revised(item)),
                note=_note,
            ),
            ctx,
        )
        # A resumed run took some layers from disk and made the others.
        share_codebooks(checkpoint)
        ordered = count_shared_once(checkpoint, [rows[name] for name in tasks])
        return StageResult(
            checkpoint=checkpoint,
            layers=(*ordered, *float_rows(assignments, checkpoint)),
            metrics=_metrics(walk, ordered),
            notes=_notes(walk, ordered),
        )


def _note(row: Mapping[str, Any]) -> str:
    if "loss" not in row:
        return f"rounded, weight error {row['weight_error']:.2e}"
    return f"loss {row['loss']:.2e}, plain rounding {row['loss_rtn']:.2e}"


def _metrics(walk: BlockWalk, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "layers": len(rows),
        "layers_rounded": sum(row["plain"] for row in rows),
        "calibration": {
            **describe_calibration(walk),
            "truncated_samples": sum(prompt.is_truncated for prompt in walk.prompts),
        },
    }


def _notes(walk: BlockWalk, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    notes = [*note_synthetic(walk.samples)]
    if walk.tower_samples < walk.first_held_out:
        notes.append(
            f"the tower's Hessians are those of {walk.tower_samples} of {walk.first_held_out} "
            "images"
        )
    truncated = sum(prompt.is_truncated for prompt in walk.prompts)
    if truncated:
        notes.append(f"{truncated} calibration texts were cut off at the longest length used")
    notes += [f"{row['name']}: {row['reason']}" for row in rows if row["reason"]]
    for row in rows:
        if row.get("damping_raised"):
            notes.append(f"{row['name']}: damping was raised to {row['damping']:g}")
        if row.get("hessian_blocks", 1) > 1:
            notes.append(
                f"{row['name']}: its Hessian is {row['hessian_blocks']} diagonal blocks; the "
                "whole would not fit into memory"
            )
    return tuple(notes)
