"""Round-to-nearest: every weight to the closest point of its group's grid, without any data.

The baseline that every calibrated method has to beat, and at 8 bits usually all that is needed.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import torch

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint, StageRecord
from pocketvlm.compress.quantization.affine import (
    GRIDS,
    Grid,
    GridKind,
    affine_form,
    decode,
    encode,
    group_columns,
)
from pocketvlm.compress.quantization.layers import (
    FinishedLayer,
    LayerStore,
    describe_layer,
    float_rows,
    row_chunks,
    stage_version,
)
from pocketvlm.compress.quantization.rules import Assignment, WeightRule, assign_layers
from pocketvlm.context import RunContext
from pocketvlm.errors import CheckpointError
from pocketvlm.report import peak_rss_bytes
from pocketvlm.weights import AffineWeight, WeightForm

__all__ = ["RoundToNearest", "round_layer", "round_to_nearest"]


def round_to_nearest(
    weight: WeightForm, *, bits: int, group_size: int, symmetric: bool, grid: GridKind = "min_max"
) -> tuple[AffineWeight, float]:
    """Rounds a weight.

    Args:
        weight: The weight, float.
        bits: Width of a code.
        group_size: Columns that share a scale.
        symmetric: Whether the zero point is fixed.
        grid: How a group's grid is found.

    Returns:
        The quantized weight, and its squared error relative to the weight's own squares.

    Raises:
        ValueError: A group's range is too large for a float16 scale.
    """
    codes, scales, zeros = [], [], []
    lost = total = 0.0
    for _, rows in row_chunks(weight):
        groups = group_columns(rows, group_size)
        found = GRIDS[grid](groups, bits, symmetric=symmetric)
        chosen = encode(groups, found)
        lost += float((decode(chosen, found) - groups).square_().sum())
        total += float(rows.square().sum())
        codes.append(chosen.view(rows.shape[0], -1).to(torch.uint8))
        scales.append(found.scale)
        zeros.append(found.zero)
    form = affine_form(
        torch.cat(codes),
        Grid(scale=torch.cat(scales), zero=torch.cat(zeros), bits=bits),
        group_size=group_size,
        in_features=weight.shape[1],
        symmetric=symmetric,
    )
    return form, lost / total if total else 0.0


def round_layer(
    assignment: Assignment, weight: WeightForm, grid: GridKind, *, reason: str = ""
) -> FinishedLayer:
    """Rounds the layer of an assignment and describes it.

    Raises:
        CheckpointError: The weight is too large for float16 scales.
    """
    started = time.perf_counter()
    rule = assignment.rule
    if rule is None or rule.bits is None:
        raise ValueError(f"{assignment.linear.name} is not to be quantized")
    try:
        form, weight_error = round_to_nearest(
            weight,
            bits=rule.bits,
            group_size=rule.group_size,
            symmetric=rule.symmetric,
            grid=grid,
        )
    except ValueError as error:
        raise CheckpointError(f"{assignment.linear.name}: {error}") from error
    row = describe_layer(
        assignment,
        form,
        method="rtn",
        weight_error=weight_error,
        reason=reason,
        seconds=time.perf_counter() - started,
    )
    return FinishedLayer(form=form, row=row)


@dataclass(frozen=True, kw_only=True)
class RoundToNearest:
    """Rounds every selected layer to its nearest codes.

    Attributes:
        rules: Ordered rules; the first that matches a layer wins.
        grid: `min_max` spans each group's range, `mse` searches for the least squared error.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"float_weights"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantized_weights"})
    forbids: ClassVar[frozenset[str]] = frozenset()

    method: Literal["rtn"] = "rtn"
    rules: tuple[WeightRule, ...]
    grid: GridKind = "min_max"

    def __post_init__(self) -> None:
        if not self.rules:
            raise ValueError("rules must hold at least one rule")
        if self.grid not in GRIDS:
            raise ValueError(f"grid {self.grid!r} is unknown; allowed are {', '.join(GRIDS)}")

    def apply(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> Checkpoint:
        """Quantizes the checkpoint in place; `calibration` is not looked at.

        Raises:
            RecipeError: A rule does not fit the model, or a layer is quantized already.
        """
        started = time.perf_counter()
        assignments = assign_layers(self.rules, checkpoint)
        wanted = [item for item in assignments if item.rule is not None]
        store = LayerStore(ctx.scratch_dir)
        rows = []
        for done, item in enumerate(wanted, start=1):
            name = item.linear.name
            layer = store.load(name)
            if layer is None:
                layer = round_layer(item, checkpoint.form(name), self.grid)
                store.save(name, layer)
            checkpoint.set_form(name, layer.form)
            rows.append(layer.row)
            ctx.report("rtn", done, len(wanted), f"{name}: {layer.row['weight_error']:.2e}")
        record = StageRecord(
            method=self.method,
            parameters=asdict(self),
            version=stage_version(),
            calibration_sha256=None,
            layers=(*rows, *float_rows(assignments, checkpoint)),
            metrics={"layers": len(wanted)},
            seconds=time.perf_counter() - started,
            peak_rss_bytes=peak_rss_bytes(),
        )
        return checkpoint.extend(record)
