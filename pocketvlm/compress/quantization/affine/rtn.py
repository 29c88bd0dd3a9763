"""Round-to-nearest: every weight to the closest point of its group's grid, without any data.

The baseline that every calibrated method has to beat, and at 8 bits usually all that is needed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.driver import LayerMethod, LayerwiseRun, compress_layers
from pocketvlm.compress.layerwise.hessian import InputHessian
from pocketvlm.compress.layerwise.layer_store import FinishedLayer
from pocketvlm.compress.layerwise.row_chunks import keeps_in, row_chunks
from pocketvlm.compress.quantization.affine.grid import (
    GRIDS,
    AffineScheme,
    Grid,
    GridKind,
    affine_form,
    check_grid,
    decode,
    encode,
    group_columns,
)
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.layer_report import (
    behind_mask,
    describe_quantized,
    float_rows,
)
from pocketvlm.compress.quantization.rules import (
    Assignment,
    assign_layers,
    plan_layouts,
    require_rules,
)
from pocketvlm.context import RunContext
from pocketvlm.errors import CheckpointError
from pocketvlm.stages import PlanState, Stage, StageResult
from pocketvlm.weights.form import WeightForm

__all__ = ["RoundToNearest", "round_to_nearest"]


def round_to_nearest(
    weight: WeightForm, *, scheme: AffineScheme, group_size: int, grid: GridKind = "min_max"
) -> tuple[WeightForm, float]:
    """Rounds a weight; grids under a mask are those of the elements that it keeps.

    Args:
        weight: The weight, float, dense or masked.
        scheme: The kind of grid.
        group_size: Columns that share a scale.
        grid: How a group's grid is found.

    Returns:
        The quantized weight, an `AffineWeight` or the same integers under the weight's mask, and
        its squared error relative to the weight's own squares.

    Raises:
        ValueError: A group's range is too large for a float16 scale.
    """
    codes, scales, zeros = [], [], []
    lost = total = 0.0
    for part, rows in row_chunks(weight):
        groups = group_columns(rows, group_size)
        mask = keeps_in(weight, part)
        keeps = None if mask is None else group_columns(mask, group_size)
        found = GRIDS[grid](groups, scheme, keeps=keeps)
        chosen = encode(groups, found)
        errors = (decode(chosen, found) - groups).square_()
        lost += float((errors if keeps is None else errors[keeps]).sum())
        total += float(rows.square().sum())
        codes.append(chosen.view(rows.shape[0], -1).to(torch.uint8))
        scales.append(found.scale)
        zeros.append(found.zero)
    form = affine_form(
        torch.cat(codes),
        Grid(scale=torch.cat(scales), zero=torch.cat(zeros), scheme=scheme),
        group_size=group_size,
        in_features=weight.shape[1],
    )
    return behind_mask(form, weight), lost / total if total else 0.0


@dataclass(frozen=True, kw_only=True)
class RoundToNearest(Stage):
    """Rounds every selected layer to its nearest codes.

    Attributes:
        rules: Ordered rules; the first that matches a layer wins.
        grid: `min_max` spans each group's range, `mse` searches for the least squared error.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"float_weights"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantized_weights"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized_cache"})

    carries_taps: ClassVar[bool] = True

    method: Literal["rtn"] = "rtn"
    rules: tuple[WeightRule, ...]
    grid: GridKind = "min_max"

    def __post_init__(self) -> None:
        require_rules(self.rules)
        check_grid(self.grid)

    @property
    def shares_work(self) -> bool:
        """Every process rounds some of the layers."""
        return True

    def plan(self, state: PlanState) -> PlanState:
        """Gives each layer the layout of its rule."""
        return state.with_layouts(plan_layouts(self.rules, state.spec.linears()))

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Quantizes the checkpoint in place; `calibration` is not looked at.

        Raises:
            RecipeError: A rule does not fit the model, or a layer is quantized already.
            CheckpointError: A weight is too large for float16 scales.
        """
        assignments = assign_layers(self.rules, checkpoint)
        tasks = {item.linear.name: item for item in assignments if item.rule is not None}
        rows = compress_layers(
            checkpoint,
            LayerwiseRun(
                title=self.method,
                tasks=tasks,
                begin=lambda: _NearestCodes(grid=self.grid),
                walk=None,
                note=lambda row: f"{row['weight_error']:.2e}",
            ),
            ctx,
        )
        return StageResult(
            checkpoint=checkpoint,
            is_calibrated=False,
            layers=(*rows.values(), *float_rows(assignments, checkpoint)),
            metrics={"layers": len(tasks)},
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _NearestCodes(LayerMethod[Assignment[WeightRule]]):
    grid: GridKind

    def compress(
        self, task: Assignment[WeightRule], weight: WeightForm, hessian: InputHessian | None
    ) -> FinishedLayer:
        started = time.perf_counter()
        rule = task.rule
        if rule is None:
            raise ValueError(f"{task.linear.name} is not to be quantized")
        try:
            form, weight_error = round_to_nearest(
                weight,
                scheme=rule.scheme,
                group_size=rule.columns_a_group(weight.shape[1]),
                grid=self.grid,
            )
        except ValueError as error:
            raise CheckpointError(f"{task.linear.name}: {error}") from error
        row = describe_quantized(
            task,
            form,
            method="rtn",
            plain=True,
            weight_error=weight_error,
            seconds=time.perf_counter() - started,
        )
        return FinishedLayer(form=form, row=row)
