"""What the stages of all methods share that set weights to zero: their options, and their record.

What a layer keeps becomes a `SparseWeight`: its mask is explicit from here on, and a quantizer or
an exporter that finds it keeps every zero exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.data.modality import ModalityWeighting
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.driver import LayerwiseRun, compress_layers
from pocketvlm.compress.layerwise.report import describe_layer
from pocketvlm.compress.pruning.unstructured.gblm import Gblm
from pocketvlm.compress.pruning.unstructured.magnitude import Magnitude
from pocketvlm.compress.pruning.unstructured.method import PruningMethod
from pocketvlm.compress.pruning.unstructured.rules import (
    DEFAULT_RULES,
    PruneRule,
    PruningDecision,
)
from pocketvlm.compress.pruning.unstructured.score import PruningScore
from pocketvlm.compress.pruning.unstructured.sparsegpt import SparseGpt
from pocketvlm.compress.pruning.unstructured.sparsity import (
    Sparsity,
    SparsityOptions,
    describe_sparsity,
)
from pocketvlm.compress.pruning.unstructured.wanda import Wanda
from pocketvlm.context import RunContext
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import PlanState, Stage, StageResult
from pocketvlm.stages.walk_options import WalkOptions, note_synthetic

__all__ = ["SCORES", "Prune", "Score", "Update"]

Update = Literal["none", "regression"]
Score = Magnitude | Wanda | Gblm | SparseGpt
"""Everything that a recipe may name as `score`."""
SCORES: Mapping[str, type[PruningScore]] = {kind.kind: kind for kind in get_args(Score)}
"""The same by name."""


@dataclass(frozen=True, kw_only=True)
class Prune(Stage, WalkOptions, SparsityOptions):
    """Sets the weights to zero that a score finds dispensable.

    Attributes:
        score: What a weight is worth.
        rules: Ordered rules; the first that matches a layer wins.
        update: `regression` fits what every layer keeps, and then the last linear of every
            sublayer, to the float model's outputs; costs a second forward pass.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"float_weights", "all_tokens"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized_cache"})
    carries_taps: ClassVar[bool] = True

    method: Literal["prune"] = "prune"
    score: Score
    rules: tuple[PruneRule, ...] = DEFAULT_RULES
    update: Update = "none"
    modality_weights: ModalityWeighting = "uniform"

    def __post_init__(self) -> None:
        self.sparsity  # noqa: B018  (which checks what it holds)
        self.check_walk_options()
        if self.update not in get_args(Update):
            raise ValueError(
                f"update {self.update!r} is unknown; allowed are {', '.join(get_args(Update))}"
            )

    @property
    def sparsity(self) -> Sparsity:
        """How much of which layers is removed."""
        return self.sparsity_under(self.rules)

    @property
    def carries_float(self) -> bool:
        """Whether the float model has to run along."""
        return self.update == "regression"

    @property
    def uses_device(self) -> bool:
        """Forward and backward passes and moments; masks are chosen in main memory."""
        return not self.carries_float

    @property
    def shares_work(self) -> bool:
        """Moments are those of the samples of all processes; regression sees them together."""
        return not self.carries_float

    @property
    def takes_gradients(self) -> bool:
        """Whether the score or the allocation does."""
        score: PruningScore = self.score
        return score.takes_gradients or self.allocation.takes_gradients

    def plan(self, state: PlanState) -> PlanState:
        """Masks layers, as if all kept the same share, and notes what sharing out will cost."""
        return self.sparsity.plan(state)

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Prunes the checkpoint in place.

        Raises:
            RecipeError: A rule or the pattern does not fit the model, or a layer is pruned already.
            CalibrationError: A sample cannot be used, or what is measured is not finite.
            CheckpointError: A weight that is kept is too large for float16.
        """
        decisions = self.sparsity.decide(checkpoint.spec.linears())
        tasks, budget = self.sparsity.share_out(checkpoint, decisions, calibration, ctx)
        score: PruningScore = self.score
        reads_inputs = score.needs_inputs or self.carries_float

        def begin() -> PruningMethod:
            pruner = score.begin(checkpoint, tuple(tasks.values()), calibration, self.held_out, ctx)
            return PruningMethod(feedback=score.feedback, pruner=pruner, refits=self.carries_float)

        rows = compress_layers(
            checkpoint,
            LayerwiseRun(
                title=self.method,
                tasks=tasks,
                begin=begin,
                walk=self.walk(checkpoint, calibration, ctx) if reads_inputs else None,
                revised=_sublayer_outputs(checkpoint.spec) & tasks.keys()
                if self.carries_float
                else frozenset(),
                note=_note,
            ),
            ctx,
        )
        return StageResult(
            checkpoint=checkpoint,
            layers=tuple(
                rows.get(decision.linear.name) or _kept_row(decision, checkpoint)
                for decision in decisions
            ),
            metrics={
                "layers": len(tasks),
                **describe_sparsity(tasks, budget),
                "calibration": calibration.describe(),
            },
            notes=(*budget.notes, *_notes(calibration, rows.values())),
        )


def _sublayer_outputs(spec: ModelSpec) -> frozenset[str]:
    """The last linear of every sublayer."""
    blocks = (*spec.tower.blocks, *spec.decoder.blocks)
    return frozenset(name for block in blocks for name in (block.mixer.output, block.ffn.output))


def _kept_row(decision: PruningDecision, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        **describe_layer(decision.linear, checkpoint.form(decision.linear.name)),
        "method": "none",
        "sparsity": 0.0,
        "reason": decision.reason,
    }


def _note(row: Mapping[str, Any]) -> str:
    if "loss" not in row:
        return f"sparsity {row['sparsity']:.2f}, weight error {row['weight_error']:.2e}"
    return (
        f"sparsity {row['sparsity']:.2f}, loss {row['loss']:.2e}, "
        f"by magnitude {row['loss_magnitude']:.2e}"
    )


def _notes(calibration: CalibrationSet, rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    notes = [*note_synthetic(calibration)]
    for row in rows:
        if row["reason"]:
            notes.append(f"{row['name']}: {row['reason']}")
        if row["dead_rows"]:
            notes.append(f"{row['name']}: {row['dead_rows']} outputs keep no weight at all")
    return tuple(notes)
