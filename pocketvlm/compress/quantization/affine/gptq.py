"""GPTQ on image and text: rounds weights so that each layer's *output* changes least.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323. The kernel is `layerwise.error_feedback`, the walk `layerwise.driver`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.error_feedback import (
    Factor,
    quantize_with_feedback,
)
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
    group_columns,
)
from pocketvlm.compress.quantization.affine.outliers import MOST_LOST, input_loss
from pocketvlm.compress.quantization.affine.rounding import AffineRounding
from pocketvlm.compress.quantization.affine.rtn import round_to_nearest
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.calibrated import CalibratedQuantizer
from pocketvlm.compress.quantization.layer_quantizer import LayerQuantizer
from pocketvlm.compress.quantization.layer_report import behind_mask
from pocketvlm.compress.quantization.rules import Assignment, plan_layouts, require_rules
from pocketvlm.context import RunContext
from pocketvlm.models.layers import LinearSpec
from pocketvlm.stages import PlanState, StageResult
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.layout import AffineLayout

__all__ = ["AffineQuantizer", "Gptq", "quantize_affine"]

_OUTLIER_GROUPS = (32, 64, 128)  # every target has a kernel for these


def quantize_affine(
    weights: Tensor,
    factor: Factor,
    scheme: AffineScheme,
    *,
    group_size: int,
    grid: GridKind = "min_max",
    static_groups: bool = False,
    diagonal: Tensor | None = None,
    keeps: Tensor | None = None,
    fixed: Grid | None = None,
) -> tuple[Tensor, Grid]:
    """Rounds rows of a weight to affine grids, with error feedback.

    Args:
        weights: float64 [rows, columns].
        factor: Of the columns' Hessian.
        scheme: The kind of grid.
        group_size: Columns that share a scale.
        grid: How a group's grid is found.
        static_groups: Whether all grids are made from the weights as they were, rather than from
            weights that carry the errors of the columns before.
        diagonal: Of the Hessian, [columns]: how much an error counts where grids are searched.
        keeps: Which elements a mask keeps, bool [rows, columns]; `None` for all.
        fixed: Grids [rows, groups] that are known; `None` makes them.

    Returns:
        Codes [rows, groups * group_size], padding included, in the type of the weights, and the
        grid [rows, groups]. The code of an element that the mask drops stands for nothing.

    Raises:
        ValueError: A group's range is too large for a float16 scale.
    """
    if static_groups and fixed is None:
        importance = None if diagonal is None else group_columns(diagonal[None], group_size)
        grouped = None if keeps is None else group_columns(keeps, group_size)
        fixed = GRIDS[grid](group_columns(weights, group_size), scheme, importance, grouped)
    rounding = AffineRounding(
        scheme,
        grid,
        rows=weights.shape[0],
        groups=len(factor.order.groups),
        device=weights.device,
        fixed=fixed,
        importance=None if diagonal is None else factor.order.split(diagonal),
    )
    chosen = quantize_with_feedback(weights, factor, rounding, keeps)
    found = rounding.grid
    # Padding stands for zero, or for what is nearest to it.
    codes = found.zero.round().clamp(scheme.lowest, scheme.highest)
    codes = codes.repeat_interleave(group_size, dim=1)
    codes[:, : weights.shape[1]] = chosen.T
    return codes, found


@dataclass(frozen=True, kw_only=True, eq=False)
class AffineQuantizer(LayerQuantizer[WeightRule]):
    """GPTQ beside round-to-nearest.

    Attributes:
        grid: How a group's grid is found.
        static_groups: Whether grids are made before the first column is rounded.
        outlier_group_size: Columns of a group of layers that are to have int8 rows and whose inputs
            have outliers; `None` gives rows to all.
    """

    on_device: ClassVar[bool] = True

    grid: GridKind = "min_max"
    static_groups: bool = False
    outlier_group_size: int | None = None

    def compress(
        self, task: Assignment[WeightRule], weight: WeightForm, hessian: InputHessian | None
    ) -> FinishedLayer:
        """Quantizes a layer, in groups where inputs with one scale would cost too much."""
        rule, linear, groups = task.rule, task.linear, self.outlier_group_size
        if rule is None or hessian is None or groups is None or groups >= linear.in_features:
            return super().compress(task, weight, hessian)
        if not rule.plan(linear).has_byte_rows(linear.in_features):
            return super().compress(task, weight, hessian)
        loss = input_loss(weight, hessian, linear.part)
        if loss <= MOST_LOST:
            done = super().compress(task, weight, hessian)
            return replace(done, row={**done.row, "input_loss": loss})
        done = super().compress(
            replace(task, rule=replace(rule, group_size=groups)), weight, hessian
        )
        reason = (
            f"groups of {groups} instead of a row: inputs in int8 with one scale would cost "
            f"{loss:.1e} of its squared output, more than {MOST_LOST:g}"
        )
        reasons = "; ".join(filter(None, (reason, done.row["reason"])))
        return replace(done, row={**done.row, "input_loss": loss, "reason": reasons})

    def labels(self, rule: WeightRule, linear: LinearSpec) -> tuple[str, str]:
        """Names in reports."""
        return "gptq", "rtn"

    def round(self, rule: WeightRule, linear: LinearSpec, weight: WeightForm) -> WeightForm:
        """Round-to-nearest."""
        form, _ = round_to_nearest(
            weight,
            scheme=rule.scheme,
            group_size=rule.columns_a_group(weight.shape[1]),
            grid=self.grid,
        )
        return form

    def fit(
        self, rule: WeightRule, linear: LinearSpec, weight: WeightForm, hessian: InputHessian
    ) -> WeightForm:
        """GPTQ, some rows at a time and with the weight's mask; see `quantize_affine`.

        A row that shares one scale and is wider than a block of the Hessian has its grid made from
        the weights as they were: errors are not fed on from block to block, and every block needs
        it.
        """
        group_size = rule.columns_a_group(weight.shape[1])
        factors = hessian.factors(group_size)
        is_split = group_size > hessian.slices[0].stop
        codes, scales, zeros = [], [], []
        for span, rows in row_chunks(weight, hessian.device):
            targets = hessian.targets(rows, group_size)
            keeps = keeps_in(weight, span, hessian.device)
            fixed = None
            if is_split:
                importance = hessian.importance[None, None]
                grouped = None if keeps is None else keeps[:, None]
                fixed = GRIDS[self.grid](targets[:, None], rule.scheme, importance, grouped)
                scales.append(fixed.scale)
                zeros.append(fixed.zero)
            for part, factor, block in zip(hessian.slices, factors, hessian.hessians, strict=True):
                chosen, found = quantize_affine(
                    targets[:, part],
                    factor,
                    rule.scheme,
                    group_size=min(group_size, part.stop - part.start),
                    grid=self.grid,
                    static_groups=self.static_groups,
                    diagonal=block.diagonal().to(torch.float64),
                    keeps=None if keeps is None else keeps[:, part],
                    fixed=fixed,
                )
                codes.append(chosen.to(torch.uint8))
                if not is_split:
                    scales.append(found.scale)
                    zeros.append(found.zero)
        grids = 1 if is_split else len(factors)
        form = affine_form(
            _join(codes, len(factors)),
            Grid(scale=_join(scales, grids), zero=_join(zeros, grids), scheme=rule.scheme),
            group_size=group_size,
            in_features=weight.shape[1],
        )
        return behind_mask(form, weight)


def _join(pieces: Sequence[Tensor], blocks: int) -> Tensor:
    """Puts together what was made chunk by chunk of rows, and block by block within each."""
    rows = [
        torch.cat(list(pieces[start : start + blocks]), dim=1)
        for start in range(0, len(pieces), blocks)
    ]
    return torch.cat(rows)


@dataclass(frozen=True, kw_only=True)
class Gptq(CalibratedQuantizer):
    """Quantizes with error feedback (arXiv 2210.17323), calibrated on images and text.

    Attributes:
        rules: Bits and groups; the first rule that matches a layer wins.
        grid: `min_max` spans each group's range, `mse` searches for the least squared error.
        static_groups: Whether grids are made from the weights as they were.
        outlier_group_size: 32, 64 or 128: where a rule gives int8 one scale per row, a layer whose
            inputs have outliers takes groups of that many columns; `None` gives it rows anyway.
    """

    method: Literal["gptq"] = "gptq"
    rules: tuple[WeightRule, ...]
    grid: GridKind = "min_max"
    static_groups: bool = False
    outlier_group_size: int | None = 32

    def __post_init__(self) -> None:
        require_rules(self.rules)
        super().__post_init__()
        check_grid(self.grid)
        if self.outlier_group_size not in (*_OUTLIER_GROUPS, None):
            allowed = ", ".join(map(str, _OUTLIER_GROUPS))
            raise ValueError(
                f"outlier_group_size is {self.outlier_group_size}; allowed are {allowed}, or null "
                "to give rows to all"
            )

    @property
    def uses_device(self) -> bool:
        """Forward passes, moments and error feedback."""
        return True

    @property
    def shares_work(self) -> bool:
        """Moments are those of the samples of all processes."""
        return True

    def plan(self, state: PlanState) -> PlanState:
        """Gives each layer the layout of its rule."""
        planned = plan_layouts(self.rules, state.spec.linears())
        rows = sum(
            isinstance(layout, AffineLayout) and layout.has_byte_rows(linear.in_features)
            for linear, layout in planned.items()
        )
        state = state.with_layouts(planned)
        if not rows or self.outlier_group_size is None:
            return state
        return state.with_notes(
            f"gptq: {rows} layers have int8 rows; those whose inputs have outliers on the "
            f"calibration data will take groups of {self.outlier_group_size} instead, and the "
            "report names them"
        )

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Quantizes the checkpoint in place; raises what `quantize` raises."""
        return self.quantize(
            checkpoint,
            calibration,
            ctx,
            rules=self.rules,
            begin=lambda _: AffineQuantizer(
                feedback=self.feedback,
                grid=self.grid,
                static_groups=self.static_groups,
                outlier_group_size=self.outlier_group_size,
            ),
        )
