"""SparseGPT and GPTQ in one pass: what stays makes up for what is dropped and for its own rounding.

Frantar and Alistarh, arXiv 2301.00774, section 3.5: the pass that drops weights rounds those that
stay to their grid, so that one error is fed on where a stage after another feeds on two. A group's
grid spans what it would keep when it begins; its columns choose as they do without a grid. Layers
that are not pruned, such as the tables, are quantized by GPTQ in the same walk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.error_feedback import Order, quantize_with_feedback
from pocketvlm.compress.layerwise.hessian import InputHessian, diagonal_block_width
from pocketvlm.compress.pruning.unstructured.masked_rounding import (
    Compare,
    MaskedRounding,
    check_compare,
    columns_together,
    count_groups,
    layer_scores,
    mask_columns,
)
from pocketvlm.compress.pruning.unstructured.patterns import select
from pocketvlm.compress.pruning.unstructured.rules import DEFAULT_RULES, PruneRule
from pocketvlm.compress.pruning.unstructured.score import PruningTask
from pocketvlm.compress.pruning.unstructured.sparsity import (
    Sparsity,
    SparsityOptions,
    describe_sparsity,
)
from pocketvlm.compress.quantization.affine.gptq import AffineQuantizer
from pocketvlm.compress.quantization.affine.grid import Grid, GridKind, affine_form, check_grid
from pocketvlm.compress.quantization.affine.rounding import AffineRounding
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.calibrated import CalibratedQuantizer
from pocketvlm.compress.quantization.rules import plan_layouts, require_rules
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.models.layers import LinearSpec
from pocketvlm.stages import PlanState, StageResult
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.layout import AffineLayout, SparseLayout, WeightLayout
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["SparseGptGptq", "prune_and_quantize"]


def prune_and_quantize(
    weights: Tensor,
    hessian: InputHessian,
    rule: WeightRule,
    task: PruningTask,
    *,
    compare: Compare = "rows",
    grid: GridKind = "min_max",
) -> SparseWeight:
    """Prunes and rounds a weight against the Hessian of its input, in one pass.

    Args:
        weights: float64 [rows, columns].
        hessian: Of the layer's input.
        rule: Of the grid.
        task: The pattern, and how many elements are kept.
        compare: Within an output row, or over the whole layer.
        grid: How a group's grid is found, from the weights that it keeps.

    Raises:
        CalibrationError: A score is not finite.
        ValueError: A group's range is too large for a float16 scale.
    """
    scheme, group_size = rule.scheme, rule.columns_a_group(weights.shape[1])
    factors = hessian.factors(group_size)
    width = mask_columns(task.pattern, group_size)
    alive = hessian.importance > 0
    scores = layer_scores(weights, hessian, factors)
    counts = count_groups(scores, task.pattern, task.kept, compare, width)
    mask = torch.empty(weights.shape, dtype=torch.bool)
    codes = torch.zeros(len(weights), -(-weights.shape[1] // group_size) * group_size)
    grids: list[Grid] = []
    for part, factor, block in zip(hessian.slices, factors, hessian.hessians, strict=True):
        diagonal = block.diagonal().to(torch.float64)
        values = AffineRounding(
            scheme,
            grid,
            rows=len(weights),
            groups=len(factor.order.groups),
            device=weights.device,
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


@dataclass(frozen=True, kw_only=True, eq=False)
class _PruningQuantizer(AffineQuantizer):
    """SparseGPT with GPTQ beside rounding what is largest; GPTQ for layers without a task.

    Attributes:
        tasks: What layers keep, by their names.
        compare: Within an output row, or over the whole layer.
    """

    on_device: ClassVar[bool] = False

    tasks: Mapping[str, PruningTask]
    compare: Compare

    def labels(self, rule: WeightRule, linear: LinearSpec) -> tuple[str, str]:
        """Names in reports."""
        if linear.name in self.tasks:
            return "sparsegpt_gptq", "magnitude_rtn"
        return super().labels(rule, linear)

    def round(self, rule: WeightRule, linear: LinearSpec, weight: WeightForm) -> WeightForm:
        """The largest elements, rounded to nearest."""
        task = self.tasks.get(linear.name)
        if task is not None:
            dense = weight.dequantize()
            mask = select(dense.abs(), task.pattern, task.kept)
            weight = SparseWeight.from_form(DenseWeight(values=dense), mask)
        return super().round(rule, linear, weight)

    def fit(
        self, rule: WeightRule, linear: LinearSpec, weight: WeightForm, hessian: InputHessian
    ) -> WeightForm:
        """Both in one pass."""
        task = self.tasks.get(linear.name)
        if task is None:
            return super().fit(rule, linear, weight, hessian)
        dense = weight.dequantize().to(torch.float64)
        targets = hessian.targets(dense, rule.grid_columns(linear))
        return prune_and_quantize(
            targets, hessian, rule, task, compare=self.compare, grid=self.grid
        )


@dataclass(frozen=True, kw_only=True)
class SparseGptGptq(CalibratedQuantizer, SparsityOptions):
    """Prunes by SparseGPT and quantizes by GPTQ in one pass, calibrated on images and text.

    Attributes:
        rules: Bits and groups; every layer that is pruned needs one.
        prune_rules: Which layers are pruned, and by how much; the first that matches a layer wins.
        pattern: Which elements may be removed together; groups are whole numbers of it.
        compare: `rows` keeps as much of every output row, `layer` compares all rows of a layer.
        grid: `min_max` spans what a group keeps, `mse` searches for the least squared error.
        order: Order in which columns are visited; `group_aware` starts with those that are excited
            most, which suits rounding and leaves nobody to make up for dropping the others.
    """

    method: Literal["sparsegpt_gptq"] = "sparsegpt_gptq"
    rules: tuple[WeightRule, ...]
    prune_rules: tuple[PruneRule, ...] = DEFAULT_RULES
    compare: Compare = "rows"
    grid: GridKind = "min_max"
    order: Order = "natural"

    def __post_init__(self) -> None:
        require_rules(self.rules)
        self.sparsity  # noqa: B018  (which checks what it holds)
        check_compare(self.compare)
        super().__post_init__()
        check_grid(self.grid)
        wide = columns_together(self.pattern)
        for number, rule in enumerate(self.rules):
            if not rule.keeps_float and (rule.group_size or 0) % wide:
                raise ValueError(
                    f"rules.{number}: group_size {rule.group_size} is not a multiple of the {wide} "
                    f"columns of {self.pattern.label}"
                )

    @property
    def sparsity(self) -> Sparsity:
        """How much of which layers is removed."""
        return self.sparsity_under(self.prune_rules)

    @property
    def uses_device(self) -> bool:
        """Forward passes and moments; masks are chosen in main memory."""
        return True

    @property
    def shares_work(self) -> bool:
        """Moments are those of the samples of all processes."""
        return True

    @property
    def takes_gradients(self) -> bool:
        """Whether the allocation does."""
        return self.allocation.takes_gradients

    def plan(self, state: PlanState) -> PlanState:
        """Masks layers, as if all kept the same share, and quantizes what they keep.

        Raises:
            RecipeError: A rule or the pattern does not fit the model, or a layer that is pruned
                has no rule.
        """
        linears = state.spec.linears()
        planned = self.sparsity.plan(state).with_layouts(plan_layouts(self.rules, linears))
        for decision in self.sparsity.decide(linears):
            layout = planned.layouts[decision.linear]
            if decision.reason or not isinstance(layout, SparseLayout):
                continue
            if layout.values is None:
                raise RecipeError(
                    f"{self.method}: {decision.linear.name} is pruned and no rule gives it bits; "
                    "allowed are a rule for it, or a prune rule of ratio 0"
                )
            _check_group(decision.linear, layout.values)
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
        decisions = self.sparsity.decide(checkpoint.spec.linears())
        tasks, budget = self.sparsity.share_out(checkpoint, decisions, calibration, ctx)
        done = self.quantize(
            checkpoint,
            calibration,
            ctx,
            rules=self.rules,
            begin=lambda _: _PruningQuantizer(
                feedback=self.feedback, grid=self.grid, tasks=tasks, compare=self.compare
            ),
        )
        return replace(
            done,
            metrics={**done.metrics, **describe_sparsity(tasks, budget)},
            notes=(*budget.notes, *done.notes),
        )


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
