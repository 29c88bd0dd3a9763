"""AWQ-type scaling: what rounding would hurt most is made larger before it, and undone after it.

Activation-aware weight quantization (Lin et al., arXiv 2306.00978, section 3.2): the columns of a
weight that meet large activations are multiplied by s > 1, and the inputs divided by s, so that
rounding errors on them weigh less. Here 1/s is folded into whatever produces the inputs (a norm,
or the linear before), so that the float model's function is unchanged and no runtime has to know.

The walk is that of GPTQ, so a layer's moments are those of the scaled model before it, which are
those of the model as it was.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.walk.activations import MAIN_MEMORY
from pocketvlm.calibration.walk.steps import LinearGroup
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.driver import visit_groups
from pocketvlm.compress.layerwise.hessian import diagonal_block_width
from pocketvlm.compress.layerwise.report import describe_calibration
from pocketvlm.compress.layerwise.scratch import find_document, keep_document
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.affine.scale_search import choose_scale
from pocketvlm.compress.quantization.layer_report import describe_quantized
from pocketvlm.compress.quantization.rules import (
    Assignment,
    assign_layers,
    assign_rules_to,
    require_rules,
)
from pocketvlm.compress.quantization.transforms.folding import (
    Fold,
    check_transformable,
    divide_outputs,
    find_fold,
    multiply_inputs,
)
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError, CheckpointError
from pocketvlm.stages import PlanState, Stage, StageResult
from pocketvlm.stages.walk_options import WalkOptions
from pocketvlm.weights.form import WeightForm

__all__ = ["Awq"]


@dataclass(frozen=True, kw_only=True)
class Awq(Stage, WalkOptions):
    """Scales float weights for the rounding that is to come, without changing the model.

    Attributes:
        rules: The bits and groups to prepare for: those of the quantizer that follows. Layers
            that no rule rounds do not take part in the search.
        grid_points: Exponents that are tried; the first, 0, leaves a layer as it is.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"float_weights"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized_weights", "quantized_cache"})
    carries_taps: ClassVar[bool] = True

    method: Literal["awq"] = "awq"
    rules: tuple[WeightRule, ...]
    grid_points: int = 20

    def __post_init__(self) -> None:
        require_rules(self.rules)
        if self.grid_points < 2:  # noqa: PLR2004  (one point would only be the layer as it is)
            raise ValueError(f"grid_points must be at least 2, not {self.grid_points}")
        self.check_walk_options()

    @property
    def shares_work(self) -> bool:
        """Moments are those of the samples of all processes."""
        return True

    @property
    def uses_device(self) -> bool:
        """Forward passes and moments; scales are searched in main memory."""
        return True

    def plan(self, state: PlanState) -> PlanState:
        """Checks the rules against a model; every layer stays float."""
        assign_rules_to(self.rules, state.spec.linears())
        return state

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Scales the checkpoint's weights in place.

        Raises:
            RecipeError: A rule does not fit the model, or a weight is quantized already.
            CalibrationError: A sample cannot be used, or inputs of a layer are not finite.
            CheckpointError: A weight is too large for float16 scales.
        """
        check_transformable(checkpoint, self.method)
        assignments = {item.linear.name: item for item in assign_layers(self.rules, checkpoint)}
        walk = self.walk(checkpoint, calibration, ctx)
        rows: dict[str, Mapping[str, Any]] = {}
        for group, names in visit_groups(walk, assignments):
            items = [assignments[name] for name in names]
            for row in self._scale_group(checkpoint, group, items, ctx):
                rows[row["name"]] = row
                ctx.report("awq", len(rows), len(assignments), f"{row['name']}: {_note(row)}")
        ordered = [_row_of_today(rows[name], checkpoint.form(name)) for name in assignments]
        return StageResult(
            checkpoint=checkpoint,
            layers=tuple(ordered),
            metrics={
                "layers": len(ordered),
                "layers_scaled": sum(row["method"] == self.method for row in ordered),
                "calibration": describe_calibration(walk),
            },
            notes=_notes(checkpoint, ordered),
        )

    def _scale_group(
        self,
        checkpoint: Checkpoint,
        group: LinearGroup,
        items: Sequence[Assignment[WeightRule]],
        ctx: RunContext,
    ) -> list[dict[str, Any]]:
        """Finds the scale of one shared input, or reads it where a run before this one found it.

        Returns:
            The rows of its layers, whose weights are scaled.
        """
        fold, folder = find_fold(checkpoint, items[0].linear), ctx.scratch_dir
        path = None if folder is None else folder / f"{_digest(group.names)}.json"
        found = ctx.ranks.first(None if path is None else find_document(path))
        if found is None:
            # All processes measure; what the first one finds counts.
            found = ctx.ranks.first(self._search(checkpoint, group, items, fold))
            if path is not None:
                keep_document(path, found)
        if found["scale"] is not None and isinstance(fold, Fold):
            scale = torch.tensor(found["scale"], dtype=torch.float64)
            for name in group.names:
                multiply_inputs(checkpoint, name, scale[fold.channels], folder)
            divide_outputs(checkpoint, fold.producer, scale, folder)
        return list(found["rows"])

    def _search(
        self,
        checkpoint: Checkpoint,
        group: LinearGroup,
        items: Sequence[Assignment[WeightRule]],
        fold: Fold | str,
    ) -> dict[str, Any]:
        """The scale of one shared input, `None` for one, and the rows of its layers."""
        started = time.perf_counter()
        forms = [checkpoint.form(item.linear.name) for item in items]
        rounded = {
            item.linear.name: (form, item.rule)
            for item, form in zip(items, forms, strict=True)
            if item.rule is not None
        }
        if isinstance(fold, str) or group.moments is None or not rounded:
            reason = fold if isinstance(fold, str) else ""
            rows = [
                describe_quantized(item, form, reason=reason or item.reason)
                for item, form in zip(items, forms, strict=True)
            ]
            return {"scale": None, "rows": rows}
        try:
            choice = choose_scale(
                rounded,
                group.moments(diagonal_block_width(items[0].linear.in_features, ())).to(
                    MAIN_MEMORY
                ),
                fold.channels,
                self.grid_points,
            )
        except CalibrationError as error:
            raise CalibrationError(f"{group.names[0]}: {error}") from error
        except ValueError as error:
            raise CheckpointError(f"{group.names[0]}: {error}") from error
        is_scaled = choice.scale is not None
        rows = [
            describe_quantized(
                item,
                form,
                method=self.method if is_scaled else "none",
                reason="" if is_scaled else choice.reason,
                exponent=choice.exponent,
                folded_into=fold.producer,
                **choice.figures.get(item.linear.name, {}),
                seconds=(time.perf_counter() - started) / len(items),
            )
            for item, form in zip(items, forms, strict=True)
        ]
        return {"scale": None if choice.scale is None else choice.scale.tolist(), "rows": rows}


def _row_of_today(row: Mapping[str, Any], form: WeightForm) -> dict[str, Any]:
    # Folding widens bf16 weights, those of a producer after its own row was written.
    return {**row, "bits_per_weight": form.bits_per_weight, "stored_bytes": form.stored_bytes}


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def _note(row: Mapping[str, Any]) -> str:
    if row["reason"]:
        return str(row["reason"])
    return f"loss {row['loss']:.2e}, unscaled {row['loss_rtn']:.2e}" if "loss" in row else "scaled"


def _notes(checkpoint: Checkpoint, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    counts = Counter(row["reason"] for row in rows if row["reason"])
    notes = [
        f"{count} {'layer' if count == 1 else 'layers'} unscaled: {reason}"
        for reason, count in counts.items()
    ]
    first = checkpoint.spec.projector.linears[0]
    if any(row["name"] == first and row["method"] != "none" for row in rows):
        notes.append("the projector's features are scaled: reduce visual tokens before, not after")
    return tuple(notes)
