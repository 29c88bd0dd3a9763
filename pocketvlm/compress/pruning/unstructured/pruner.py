"""What all methods share that set weights to zero: budget, walk, comparison, record.

Layers are pruned in order of execution, so that each one sees what the pruned layers before it
produce. What a layer keeps becomes a `SparseWeight`: its mask is explicit from here on, and a
quantizer or an exporter that finds it keeps every zero exactly zero.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.data.modality import ModalityWeighting
from pocketvlm.calibration.walk.walk import FinishedSublayer
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.hessian import (
    InputHessian,
    compare_outputs,
    diagonal_block_width,
)
from pocketvlm.compress.layerwise.layer_store import FinishedLayer, LayerStore
from pocketvlm.compress.pruning.unstructured.allocation import (
    Allocation,
    Budget,
    Uniform,
    uniform_counts,
)
from pocketvlm.compress.pruning.unstructured.ecoflap import Ecoflap
from pocketvlm.compress.pruning.unstructured.gblm import Gblm
from pocketvlm.compress.pruning.unstructured.magnitude import Magnitude
from pocketvlm.compress.pruning.unstructured.patterns import (
    Pattern,
    Unstructured,
    plan_mask,
    select,
)
from pocketvlm.compress.pruning.unstructured.regression import refit_half, refit_layer
from pocketvlm.compress.pruning.unstructured.rules import (
    DEFAULT_RULES,
    PruneRule,
    Target,
    choose_layers,
)
from pocketvlm.compress.pruning.unstructured.score import LayerPruner, PruningScore, PruningTask
from pocketvlm.compress.pruning.unstructured.sparsegpt import SparseGpt
from pocketvlm.compress.pruning.unstructured.wanda import Wanda
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError, CheckpointError, PocketVLMError, RecipeError
from pocketvlm.models.spec import LinearSpec
from pocketvlm.stages import PlanState, Stage, StageResult
from pocketvlm.stages.walk_options import WalkOptions, note_synthetic
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm

__all__ = ["SCORES", "Prune", "Score", "Update"]

Update = Literal["none", "regression"]
Score = Magnitude | Wanda | Gblm | SparseGpt
"""Everything that a recipe may name as `score`."""
SCORES: Mapping[str, type[PruningScore]] = {kind.kind: kind for kind in get_args(Score)}
"""The same by name."""

_ONE_BY_ONE = Unstructured()
_ALIKE = Uniform()
_REFITTED = ".refitted"


@dataclass(frozen=True, kw_only=True)
class Prune(Stage, WalkOptions):
    """Sets the weights to zero that a score finds dispensable.

    Attributes:
        score: What a weight is worth.
        ratio: Share of the weights that is removed, over all layers that rules leave to the
            allocation; at least 0 and below 1.
        rules: Ordered rules; the first that matches a layer wins.
        pattern: Which elements may be removed together.
        allocation: How the budget is shared out among layers.
        modality_weights: Weight of visual tokens in the decoder's statistics.
        held_out: Share of the samples that only judge.
        tower_tokens: Tokens after which the tower's statistics are taken to be known.
        update: `regression` fits what every layer keeps, and then the last linear of every half
            block, to the float model's outputs; costs a second forward pass.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"float_weights", "all_tokens"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized_cache"})

    method: Literal["prune"] = "prune"
    score: Score
    ratio: float = 0.5
    rules: tuple[PruneRule, ...] = DEFAULT_RULES
    pattern: Pattern = _ONE_BY_ONE
    allocation: Uniform | Ecoflap = _ALIKE
    modality_weights: ModalityWeighting = "uniform"
    held_out: float = 0.125
    tower_tokens: int = 16384
    update: Update = "none"

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
        self.check_walk_options()
        if self.update not in get_args(Update):
            raise ValueError(
                f"update {self.update!r} is unknown; allowed are {', '.join(get_args(Update))}"
            )

    @property
    def carries_float(self) -> bool:
        """Whether the float model has to run along."""
        return self.update == "regression"

    def plan(self, state: PlanState) -> PlanState:
        """Masks layers, as if all kept the same share, and notes what sharing out will cost."""
        targets = choose_layers(self.rules, self.pattern, state.spec.linears())
        allocation: Allocation = self.allocation
        masks = {
            target.linear: plan_mask(
                self.pattern, 1 - (self.ratio if target.ratio is None else target.ratio)
            )
            for target in targets
            if not target.reason
        }
        costs = allocation.plan_notes(state.spec, _free_layers(targets))
        return state.with_layouts(masks).with_notes(*costs)

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Prunes the checkpoint in place.

        Raises:
            RecipeError: A rule or the pattern does not fit the model, or a layer is pruned already.
            CalibrationError: A sample cannot be used, or what is measured is not finite.
            CheckpointError: A weight that is kept is too large for float16.
        """
        targets = choose_layers(self.rules, self.pattern, checkpoint.spec.linears())
        store = LayerStore(ctx.scratch_dir)
        tasks, budget = self.share_out(checkpoint, targets, calibration, ctx)
        rows: dict[str, Mapping[str, Any]] = {}
        for name, layer in self._layers(checkpoint, tasks, calibration, store, ctx):
            checkpoint.set_form(name, layer.form)
            rows[name] = layer.row
            ctx.report(self.method, len(rows), len(tasks), f"{name}: {_note(layer.row)}")
        kept = sum(task.kept for task in tasks.values())
        whole = sum(_size(task.linear) for task in tasks.values())
        return StageResult(
            checkpoint=checkpoint,
            layers=tuple(
                rows.get(target.linear.name) or _kept_row(target, checkpoint) for target in targets
            ),
            metrics={
                "layers": len(tasks),
                "weights": whole,
                "weights_kept": kept,
                "sparsity": 1 - kept / whole,
                "groups": [dict(row) for row in budget.rows],
                **budget.metrics,
                "calibration": calibration.describe(),
            },
            notes=(*budget.notes, *_notes(calibration, rows.values())),
        )

    def share_out(
        self,
        checkpoint: Checkpoint,
        targets: Sequence[Target],
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> tuple[dict[str, PruningTask], Budget]:
        """What is to become of every layer that is pruned, by its name.

        Raises:
            RecipeError: A layer is pruned or quantized already.
        """
        _require_dense(checkpoint, targets)
        budget = self._budget(checkpoint, targets, calibration, ctx)
        tasks = {
            target.linear.name: PruningTask(
                linear=target.linear, pattern=self.pattern, kept=budget.kept[target.linear.name]
            )
            for target in targets
            if not target.reason
        }
        return tasks, budget

    def _budget(
        self,
        checkpoint: Checkpoint,
        targets: Sequence[Target],
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> Budget:
        """What the allocation says, beside the layers whose ratio a rule fixes."""
        fixed = {
            name: count
            for target in targets
            if target.ratio is not None
            for name, count in uniform_counts([target.linear], target.ratio, self.pattern).items()
        }
        free = _free_layers(targets)
        if not free:
            return Budget(kept=fixed)
        allocation: Allocation = self.allocation
        found = allocation.allocate(checkpoint, free, self.ratio, self.pattern, calibration, ctx)
        return Budget(
            kept={**found.kept, **fixed},
            rows=found.rows,
            metrics=found.metrics,
            notes=found.notes,
        )

    def _layers(
        self,
        checkpoint: Checkpoint,
        tasks: Mapping[str, PruningTask],
        calibration: CalibrationSet,
        store: LayerStore,
        ctx: RunContext,
    ) -> Iterator[tuple[str, FinishedLayer]]:
        """Pruned layers one by one, each to be put into the checkpoint before the next is asked.

        With an update, the last layer of a half block comes a second time when the half is done.
        """
        finished = {name: layer for name in tasks if (layer := store.load(name)) is not None}
        refits = self.carries_float
        if len(finished) == len(tasks) and not refits:
            yield from finished.items()
            return
        score: PruningScore = self.score
        pruner = score.begin(checkpoint, tuple(tasks.values()), calibration, self.held_out, ctx)
        if not pruner.needs_inputs and not refits:
            for name, task in tasks.items():
                layer = finished.get(name)
                if layer is None:
                    layer = _prune(pruner, task, checkpoint.form(name), None, refits=False)
                store.save(name, layer)
                yield name, layer
            return
        walk = self.walk(checkpoint, calibration, ctx)
        left, made = set(tasks), dict[str, FinishedLayer]()
        for step in walk:
            if isinstance(step, FinishedSublayer):
                name = step.half.last
                if name in tasks:
                    layer = store.load(name + _REFITTED) or _refit(step, made[name])
                    store.save(name + _REFITTED, layer)
                    yield name, layer
                continue
            names = [name for name in step.names if name in left]
            evidence: InputHessian | None = None
            if step.moments is not None and any(name not in finished for name in names):
                width = max(tasks[name].linear.in_features for name in names)
                try:
                    evidence = pruner.weigh(
                        step.moments(diagonal_block_width(width, ())), self.pattern
                    )
                except CalibrationError as error:
                    raise CalibrationError(f"{names[0]}: {error}") from error
            for name in names:
                layer = finished.get(name)
                if layer is None:
                    weight = checkpoint.form(name)
                    layer = _prune(pruner, tasks[name], weight, evidence, refits=refits)
                    store.save(name, layer)
                left.remove(name)
                made[name] = layer
                yield name, layer
            if not left and not refits:
                return


def _require_dense(checkpoint: Checkpoint, targets: Sequence[Target]) -> None:
    for target in targets:
        form = checkpoint.form(target.linear.name)
        if not target.reason and not isinstance(form, DenseWeight):
            raise RecipeError(
                f"{target.linear.name}: is pruned or quantized already ({form.kind}); prune a "
                "dense layer, once, or keep it with a rule of ratio 0"
            )


def _free_layers(targets: Sequence[Target]) -> list[LinearSpec]:
    """Layers that the allocation shares the budget out among."""
    return [target.linear for target in targets if not target.reason and target.ratio is None]


def _prune(
    pruner: LayerPruner,
    task: PruningTask,
    weight: WeightForm,
    evidence: InputHessian | None,
    *,
    refits: bool,
) -> FinishedLayer:
    """Prunes a layer and describes what became of it, beside what magnitude would have kept."""
    started = time.perf_counter()
    name = task.linear.name
    update: dict[str, Any] = {}
    try:
        pruned = pruner.prune(task, weight, evidence)
        if refits and evidence is not None:
            refitted = refit_layer(weight, pruned.form, evidence)
            pruned = replace(pruned, form=refitted.form)
            update = {
                "update_kept": refitted.is_kept,
                "loss_before_update": refitted.before,
                "loss_after_update": refitted.after,
            }
    except CalibrationError as error:
        raise CalibrationError(f"{name}: {error}") from error
    except PocketVLMError as error:
        raise CheckpointError(f"{name}: {error}") from error
    dense = weight.dequantize()
    figures: dict[str, Any] = {}
    if evidence is not None:
        mask = select(dense.abs(), task.pattern, task.kept)
        plain = DenseWeight(values=dense * mask)
        losses = compare_outputs(weight, pruned.form, plain, evidence)
        figures = {
            "loss": losses.fitted / losses.output if losses.output > 0 else 0.0,
            "loss_magnitude": losses.plain / losses.output if losses.output > 0 else 0.0,
            "judged_on": evidence.judged_on,
            "tokens": evidence.tokens,
            "dead_columns": int((evidence.importance <= 0).sum()),
            "hessian_blocks": len(evidence.slices),
        }
    rows = pruned.mask.any(dim=1)
    row = {
        **_describe(task.linear, pruned.form),
        "method": "pruned",
        "pattern": task.pattern.label,
        "kept": task.kept,
        "sparsity": 1 - task.kept / _size(task.linear),
        "weight_error": _weight_error(dense, pruned.form),
        "dead_rows": int((~rows).sum()),
        "reason": "all of its weights are zero" if not bool(dense.any()) else "",
        **figures,
        **update,
        **pruned.figures,
        "seconds": time.perf_counter() - started,
    }
    return FinishedLayer(form=pruned.form, row=row)


def _refit(half: FinishedSublayer, layer: FinishedLayer) -> FinishedLayer:
    """The last linear of a half block, fitted to the float model's state behind the half."""
    name = half.half.last
    try:
        refitted = refit_half(half, layer.form)
    except CalibrationError as error:
        raise CalibrationError(f"{name}: {error}") from error
    except PocketVLMError as error:
        raise CheckpointError(f"{name}: {error}") from error
    row = {
        **layer.row,
        "half_update_kept": refitted.is_kept,
        "half_loss_before_update": refitted.before,
        "half_loss_after_update": refitted.after,
    }
    return FinishedLayer(form=refitted.form, row=row)


def _weight_error(dense: Tensor, form: WeightForm) -> float:
    total = float(dense.square().sum(dtype=torch.float64))
    lost = float((form.dequantize() - dense).square().sum(dtype=torch.float64))
    return lost / total if total > 0 else 0.0


def _describe(linear: LinearSpec, form: WeightForm) -> dict[str, Any]:
    return {
        "name": linear.name,
        "part": linear.part,
        "role": linear.role,
        "block": linear.block,
        "grid": "float",
        "bits": None,
        "bits_per_weight": form.bits_per_weight,
        "stored_bytes": form.stored_bytes,
    }


def _kept_row(target: Target, checkpoint: Checkpoint) -> dict[str, Any]:
    form = checkpoint.form(target.linear.name)
    return {
        **_describe(target.linear, form),
        "method": "none",
        "sparsity": 0.0,
        "reason": target.reason,
    }


def _size(linear: LinearSpec) -> int:
    return linear.out_features * linear.in_features


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
