"""How much of which layers is removed: what every unstructured method is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.unstructured.allocation import (
    Allocation,
    Budget,
    Uniform,
    uniform_counts,
)
from pocketvlm.compress.pruning.unstructured.ecoflap import Ecoflap
from pocketvlm.compress.pruning.unstructured.patterns import Pattern, Unstructured
from pocketvlm.compress.pruning.unstructured.rules import (
    PruneRule,
    PruningDecision,
    choose_layers,
)
from pocketvlm.compress.pruning.unstructured.score import PruningTask
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.models.layers import LinearSpec
from pocketvlm.stages import PlanState
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.layout import SparseLayout

__all__ = ["Sparsity", "SparsityOptions", "describe_sparsity"]

_ONE_BY_ONE = Unstructured()
_ALIKE = Uniform()


@dataclass(frozen=True, kw_only=True)
class SparsityOptions:
    """The options of every stage that removes single weights.

    Attributes:
        ratio: Share of the weights that is removed, over all layers that rules leave to the
            allocation; at least 0 and below 1.
        pattern: Which elements may be removed together.
        allocation: How the budget is shared out among layers.
    """

    ratio: float = 0.5
    pattern: Pattern = _ONE_BY_ONE
    allocation: Uniform | Ecoflap = _ALIKE

    def sparsity_under(self, rules: tuple[PruneRule, ...]) -> Sparsity:
        """What is removed of the layers that rules choose.

        Raises:
            ValueError: The options do not fit each other.
        """
        return Sparsity(
            ratio=self.ratio, pattern=self.pattern, allocation=self.allocation, rules=rules
        )


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """How much of which layers is removed.

    Attributes:
        ratio: See `SparsityOptions`, as for the next two.
        pattern: Which elements go together.
        allocation: How the budget is shared out.
        rules: Ordered rules; the first that matches a layer wins.
    """

    ratio: float
    pattern: Pattern
    allocation: Allocation
    rules: tuple[PruneRule, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be at least 0 and below 1, not {self.ratio}")
        if not self.rules:
            raise ValueError("rules must hold at least one rule")
        fixed = self.pattern.fixed_ratio
        if fixed is not None and self.ratio != fixed:
            raise ValueError(
                f"{self.pattern.label} removes {fixed:g} of every layer; ratio must be {fixed:g}, "
                f"not {self.ratio:g}"
            )
        self.allocation.check(self.ratio, self.pattern)

    def decide(self, linears: Sequence[LinearSpec]) -> tuple[PruningDecision, ...]:
        """What becomes of every layer.

        Raises:
            RecipeError: A rule matches nothing, or the pattern does not fit a layer.
        """
        return choose_layers(self.rules, self.pattern, linears)

    def plan(self, state: PlanState) -> PlanState:
        """Masks layers, as if all kept the same share, and notes what sharing out will cost.

        Raises:
            RecipeError: A rule or the pattern does not fit the model.
        """
        decisions = self.decide(state.spec.linears())
        masks = {
            decision.linear: SparseLayout(
                density=1 - (self.ratio if decision.ratio is None else decision.ratio)
            )
            for decision in decisions
            if not decision.reason
        }
        costs = self.allocation.plan_notes(state.spec, _free_layers(decisions))
        return state.with_layouts(masks).with_notes(*costs)

    def share_out(
        self,
        checkpoint: Checkpoint,
        decisions: Sequence[PruningDecision],
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> tuple[dict[str, PruningTask], Budget]:
        """What is to become of every layer that is pruned, by its name.

        Raises:
            RecipeError: A layer is pruned or quantized already.
        """
        _require_dense(checkpoint, decisions)
        kept = {
            name: count
            for decision in decisions
            if decision.ratio is not None
            for name, count in uniform_counts(
                [decision.linear], decision.ratio, self.pattern
            ).items()
        }
        budget, free = Budget(kept={}), _free_layers(decisions)
        if free:
            budget = self.allocation.allocate(
                checkpoint, free, self.ratio, self.pattern, calibration, ctx
            )
        kept |= budget.kept
        tasks = {
            decision.linear.name: PruningTask(
                linear=decision.linear, pattern=self.pattern, kept=kept[decision.linear.name]
            )
            for decision in decisions
            if not decision.reason
        }
        return tasks, budget


def describe_sparsity(tasks: Mapping[str, PruningTask], budget: Budget) -> dict[str, Any]:
    """Figures of what a stage removed, as JSON values."""
    kept = sum(task.kept for task in tasks.values())
    whole = sum(task.linear.out_features * task.linear.in_features for task in tasks.values())
    return {
        "weights": whole,
        "weights_kept": kept,
        "sparsity": 1 - kept / whole,
        "groups": [dict(row) for row in budget.rows],
        **budget.metrics,
    }


def _require_dense(checkpoint: Checkpoint, decisions: Sequence[PruningDecision]) -> None:
    for decision in decisions:
        form = checkpoint.form(decision.linear.name)
        if not decision.reason and not isinstance(form, DenseWeight):
            raise RecipeError(
                f"{decision.linear.name}: is pruned or quantized already ({form.kind}); prune a "
                "dense layer, once, or keep it with a rule of ratio 0"
            )


def _free_layers(decisions: Sequence[PruningDecision]) -> list[LinearSpec]:
    """Layers that the allocation shares the budget out among."""
    return [
        decision.linear for decision in decisions if not decision.reason and decision.ratio is None
    ]
