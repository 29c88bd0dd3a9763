"""SparseGPT and GPTQ in one pass: what stays makes up for what is dropped and for its own rounding.

Frantar and Alistarh, arXiv 2301.00774, section 3.5: the pass that drops weights rounds those that
stay to their grid, so that one error is fed on where a stage after another feeds on two. A group's
grid spans what it would keep when it begins; its columns choose as they do without a grid. Layers
that are not pruned, such as the tables, are quantized by GPTQ in the same walk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.data.modality import ModalityWeighting
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.error_feedback import (
    Order,
    quantize_with_feedback,
)
from pocketvlm.compress.layerwise.hessian import diagonal_block_width
from pocketvlm.compress.pruning.unstructured.allocation import Uniform
from pocketvlm.compress.pruning.unstructured.ecoflap import Ecoflap
from pocketvlm.compress.pruning.unstructured.patterns import Pattern, Unstructured, select
from pocketvlm.compress.pruning.unstructured.pruner import Prune
from pocketvlm.compress.pruning.unstructured.rules import DEFAULT_RULES, PruneRule, choose_layers
from pocketvlm.compress.pruning.unstructured.score import PruningTask
from pocketvlm.compress.pruning.unstructured.sparsegpt import (
    Compare,
    MaskedRounding,
    SparseGpt,
    columns_together,
    count_groups,
    layer_scores,
    mask_columns,
)
from pocketvlm.compress.quantization.affine.gptq import AffineFitter
from pocketvlm.compress.quantization.affine.grid import GRIDS, Grid, GridKind, affine_form
from pocketvlm.compress.quantization.affine.rounding import AffineRounding
from pocketvlm.compress.quantization.affine.rtn import round_to_nearest
from pocketvlm.compress.quantization.affine.rules import Assignment, WeightRule
from pocketvlm.compress.quantization.calibrated import CalibratedQuantizer, GroupQuantizer
from pocketvlm.compress.quantization.layer_quantizer import LayerQuantizer, Weighed
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.models.spec import LinearSpec
from pocketvlm.stages import PlanState, Stage, StageResult
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.layout import AffineLayout, SparseLayout, WeightLayout
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["SparseGptGptq", "prune_and_quantize"]

_ONE_BY_ONE = Unstructured()
_ALIKE = Uniform()


def prune_and_quantize(
    weights: Tensor,
    weighed: Weighed,
    rule: WeightRule,
    task: PruningTask,
    *,
    compare: Compare = "rows",
    grid: GridKind = "min_max",
) -> SparseWeight:
    """Prunes and rounds a weight against the Hessian of its input, in one pass.

    Args:
        weights: float64 [rows, columns].
        weighed: What is known of the layer's input, in groups of the rule's width.
        rule: Of the grid.
        task: The pattern, and how many elements are kept.
        compare: Within an output row, or over the whole layer.
        grid: How a group's grid is found, from the weights that it keeps.

    Raises:
        CalibrationError: A score is not finite.
        ValueError: A group's range is too large for a float16 scale.
    """
    evidence, scheme = weighed.evidence, rule.scheme
    group_size = rule.columns_a_group(weights.shape[1])
    width = mask_columns(task.pattern, group_size)
    alive = evidence.importance > 0
    scores = layer_scores(weights, evidence, weighed.factors)
    counts = count_groups(scores, task.pattern, task.kept, compare, width)
    mask = torch.empty(weights.shape, dtype=torch.bool)
    codes = torch.zeros(len(weights), -(-weights.shape[1] // group_size) * group_size)
    grids: list[Grid] = []
    for part, factor, hessian in zip(
        evidence.slices, weighed.factors, evidence.hessians, strict=True
    ):
        diagonal = hessian.diagonal().to(torch.float64)
        values = AffineRounding(
            scheme,
            grid,
            rows=len(weights),
            groups=len(factor.order.groups),
            importance=factor.order.split(diagonal),
        )
        rounding = MaskedRounding(
            factor,
            alive[part],
            task.pattern,
            compare,
            width,
            counts[part.start // width :],
            values,
        )
        codes[:, part] = quantize_with_feedback(weights[:, part], factor, rounding).T.to(
            codes.dtype
        )
        mask[:, part] = rounding.mask
        grids.append(values.grid)
    found = Grid(
        scale=torch.cat([part.scale for part in grids], dim=1),
        zero=torch.cat([part.zero for part in grids], dim=1),
        scheme=scheme,
    )
    form = affine_form(codes, found, group_size=group_size, in_features=weights.shape[1])
    return SparseWeight.from_form(form, mask)


@dataclass(frozen=True, kw_only=True)
class _PruningFitter:
    """SparseGPT with GPTQ beside rounding what is largest.

    Attributes:
        task: The layer's pattern and count.
        compare: Within an output row, or over the whole layer.
        grid: How a group's grid is found.
    """

    task: PruningTask
    compare: Compare
    grid: GridKind
    label: str = "sparsegpt_gptq"
    plain_label: str = "magnitude_rtn"

    def fit(self, rule: WeightRule, weight: WeightForm, weighed: Weighed) -> WeightForm:
        """Both in one pass."""
        targets = weighed.targets(weight.dequantize().to(torch.float64))
        return prune_and_quantize(
            targets, weighed, rule, self.task, compare=self.compare, grid=self.grid
        )

    def round(self, rule: WeightRule, weight: WeightForm) -> WeightForm:
        """The largest elements, rounded to nearest."""
        dense = weight.dequantize()
        mask = select(dense.abs(), self.task.pattern, self.task.kept)
        kept = SparseWeight.from_form(DenseWeight(values=dense), mask)
        form, _ = round_to_nearest(
            kept,
            scheme=rule.scheme,
            group_size=rule.columns_a_group(weight.shape[1]),
            grid=self.grid,
        )
        return form


@dataclass(frozen=True, kw_only=True)
class SparseGptGptq(Stage):
    """Prunes by SparseGPT and quantizes by GPTQ in one pass, calibrated on images and text.

    Attributes:
        rules: Bits and groups; every layer that is pruned needs one.
        ratio: Share of the weights that is removed, over all layers that `prune_rules` leave to
            the allocation.
        prune_rules: Which layers are pruned, and by how much.
        pattern: Which elements may be removed together; groups are whole numbers of it.
        allocation: How the budget is shared out among layers.
        compare: `rows` keeps as much of every output row, `layer` compares all rows of a layer.
        grid: `min_max` spans what a group keeps, `mse` searches for the least squared error.
        damping: Share of a Hessian's mean diagonal that is added to it.
        order: Order in which columns are visited; `group_aware` starts with those that are excited
            most, which suits rounding and leaves nobody to make up for dropping the others.
        drift_share: How much of the inputs' distance from the float model's is made up for.
        modality_weights: Weight of visual tokens in the decoder's Hessians.
        held_out: Share of the samples that only judge.
        tower_tokens: Tokens after which the tower's Hessians are taken to be known.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"float_weights"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantized_weights"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized_cache"})

    method: Literal["sparsegpt_gptq"] = "sparsegpt_gptq"
    rules: tuple[WeightRule, ...]
    ratio: float = 0.5
    prune_rules: tuple[PruneRule, ...] = DEFAULT_RULES
    pattern: Pattern = _ONE_BY_ONE
    allocation: Uniform | Ecoflap = _ALIKE
    compare: Compare = "rows"
    grid: GridKind = "min_max"
    damping: float = 0.01
    order: Order = "natural"
    drift_share: float = 0.0
    modality_weights: ModalityWeighting = "balanced"
    held_out: float = 0.125
    tower_tokens: int = 16384

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise ValueError(f"grid {self.grid!r} is unknown; allowed are {', '.join(GRIDS)}")
        self._pruning()  # which checks ratio, pattern and comparison
        self._quantizing({})  # and this all that a calibrated quantizer has
        wide = columns_together(self.pattern)
        for number, rule in enumerate(self.rules):
            if not rule.keeps_float and (rule.group_size or 0) % wide:
                raise ValueError(
                    f"rules.{number}: group_size {rule.group_size} is no multiple of the {wide} "
                    f"columns of {self.pattern.label}"
                )

    def plan(self, state: PlanState) -> PlanState:
        """Masks layers, as if all kept the same share, and quantizes what they keep.

        Raises:
            RecipeError: A rule or the pattern does not fit the model, or a layer that is pruned
                has no rule.
        """
        planned = self._quantizing({}).plan(self._pruning().plan(state))
        for target in choose_layers(self.prune_rules, self.pattern, state.spec.linears()):
            layout = planned.layouts[target.linear]
            if target.reason or not isinstance(layout, SparseLayout):
                continue
            if layout.values is None:
                raise RecipeError(
                    f"{self.method}: {target.linear.name} is pruned and no rule gives it bits; "
                    "allowed are a rule for it, or a prune rule of ratio 0"
                )
            _check_group(target.linear, layout.values)
        return planned

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Prunes and quantizes the checkpoint in place.

        Raises:
            RecipeError: A rule or the pattern does not fit the model, a layer is pruned or
                quantized already, or one that is pruned has no rule.
            CalibrationError: A sample cannot be used, or what is measured is not finite.
            CheckpointError: A weight is too large for float16 scales.
        """
        self.plan(PlanState.of(checkpoint.spec))  # which refuses what does not fit
        targets = choose_layers(self.prune_rules, self.pattern, checkpoint.spec.linears())
        tasks, budget = self._pruning().share_out(checkpoint, targets, calibration, ctx)
        done = self._quantizing(tasks).compress(checkpoint, calibration, ctx)
        whole = sum(task.linear.out_features * task.linear.in_features for task in tasks.values())
        kept = sum(task.kept for task in tasks.values())
        return replace(
            done,
            metrics={
                **done.metrics,
                "weights": whole,
                "weights_kept": kept,
                "sparsity": 1 - kept / whole,
                "groups": [dict(row) for row in budget.rows],
                **budget.metrics,
            },
            notes=(*budget.notes, *done.notes),
        )

    def _pruning(self) -> Prune:
        """The stage that would prune alone."""
        return Prune(
            score=SparseGpt(compare=self.compare),
            ratio=self.ratio,
            rules=self.prune_rules,
            pattern=self.pattern,
            allocation=self.allocation,
        )

    def _quantizing(self, tasks: Mapping[str, PruningTask]) -> _Joint:
        """The walk over all layers, some of which have something to drop."""
        return _Joint(
            rules=self.rules,
            tasks=tasks,
            compare=self.compare,
            grid=self.grid,
            damping=self.damping,
            order=self.order,
            drift_share=self.drift_share,
            modality_weights=self.modality_weights,
            held_out=self.held_out,
            tower_tokens=self.tower_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class _Joint(CalibratedQuantizer[WeightRule]):
    """GPTQ that drops weights of those layers that have a task."""

    method: Literal["sparsegpt_gptq"] = "sparsegpt_gptq"
    rules: tuple[WeightRule, ...]
    tasks: Mapping[str, PruningTask]
    compare: Compare
    grid: GridKind

    def begin(
        self,
        checkpoint: Checkpoint,
        assignments: Sequence[Assignment[WeightRule]],
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> GroupQuantizer[WeightRule]:
        """Budgets are shared out beforehand."""
        return _ByTask(self)


class _ByTask(GroupQuantizer[WeightRule]):
    def __init__(self, stage: _Joint) -> None:
        self._stage = stage

    def fitter_of(self, assignment: Assignment[WeightRule]) -> LayerQuantizer[WeightRule]:
        stage = self._stage
        task = stage.tasks.get(assignment.linear.name)
        if task is None:
            return AffineFitter(grid=stage.grid)
        return _PruningFitter(task=task, compare=stage.compare, grid=stage.grid)


def _check_group(linear: LinearSpec, values: WeightLayout) -> None:
    """Refuses a scale that spans blocks of a Hessian: it is made as each block is pruned."""
    if not isinstance(values, AffineLayout):
        return
    block = diagonal_block_width(linear.in_features, [values.group_size])
    if block is not None and values.group_size > block:
        raise RecipeError(
            f"{linear.name}: one scale for all {values.group_size} columns of a row needs their "
            f"whole Hessian, of which blocks are kept; give a group_size of at most {block}"
        )
