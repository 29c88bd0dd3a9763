"""One layer against its input: what a method keeps of it, beside what magnitude would have kept."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pocketvlm.calibration.walk.steps import FinishedSublayer
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.driver import LayerMethod
from pocketvlm.compress.layerwise.hessian import InputHessian
from pocketvlm.compress.layerwise.layer_store import FinishedLayer
from pocketvlm.compress.layerwise.output_loss import compare_outputs
from pocketvlm.compress.layerwise.report import describe_layer, relative
from pocketvlm.compress.pruning.unstructured.patterns import select
from pocketvlm.compress.pruning.unstructured.regression import refit_layer, refit_sublayer
from pocketvlm.compress.pruning.unstructured.score import LayerPruner, PruningTask
from pocketvlm.errors import CalibrationError, CheckpointError, PocketVLMError
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm

__all__ = ["PruningMethod"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PruningMethod(LayerMethod[PruningTask]):
    """Prunes layers, and may fit what they keep to the float model.

    Attributes:
        pruner: Chooses what a layer keeps.
        refits: Whether what is kept is fitted to the float model's outputs.
    """

    pruner: LayerPruner
    refits: bool

    def compress(
        self, task: PruningTask, weight: WeightForm, hessian: InputHessian | None
    ) -> FinishedLayer:
        """Prunes a layer, and describes what became of it.

        Raises:
            CalibrationError: A score is not finite.
            CheckpointError: A kept value is too large for float16.
        """
        started = time.perf_counter()
        linear = task.linear
        figures: dict[str, Any] = {}
        try:
            pruned = self.pruner.prune(task, weight, hessian)
            if self.refits and hessian is not None:
                refitted = refit_layer(weight, pruned.form, hessian)
                pruned = replace(pruned, form=refitted.form)
                figures = {
                    "update_kept": refitted.is_kept,
                    "loss_before_update": refitted.before,
                    "loss_after_update": refitted.after,
                }
        except CalibrationError as error:
            raise CalibrationError(f"{linear.name}: {error}") from error
        except PocketVLMError as error:
            raise CheckpointError(f"{linear.name}: {error}") from error
        dense = weight.dequantize()
        if hessian is not None:
            figures |= _beside_magnitude(task, weight, dense, pruned.form, hessian)
        row = {
            **describe_layer(linear, pruned.form),
            "method": "pruned",
            "pattern": task.pattern.label,
            "kept": task.kept,
            "sparsity": 1 - task.kept / (linear.out_features * linear.in_features),
            "weight_error": _weight_error(dense, pruned.form),
            "dead_rows": int((~pruned.mask.any(dim=1)).sum()),
            "reason": "all of its weights are zero" if not bool(dense.any()) else "",
            **figures,
            **pruned.figures,
            "seconds": time.perf_counter() - started,
        }
        return FinishedLayer(form=pruned.form, row=row)

    def revise(
        self,
        checkpoint: Checkpoint,
        sublayer: FinishedSublayer,
        layers: Mapping[str, FinishedLayer],
    ) -> Mapping[str, FinishedLayer]:
        """The last linear of a sublayer, fitted to the float model's state after the sublayer."""
        return {name: _refit(name, sublayer, layer) for name, layer in layers.items()}


def _beside_magnitude(
    task: PruningTask, weight: WeightForm, dense: Tensor, form: WeightForm, hessian: InputHessian
) -> dict[str, Any]:
    """Losses of a layer's outputs as it was pruned, and as its smallest weights would have been."""
    plain = DenseWeight(values=dense * select(dense.abs(), task.pattern, task.kept))
    losses = compare_outputs(weight, form, plain, hessian)
    return {
        "loss": relative(losses.fitted, losses.output),
        "loss_magnitude": relative(losses.plain, losses.output),
        "judged_on": hessian.judged_on,
        "tokens": hessian.tokens,
        "dead_columns": int((hessian.importance <= 0).sum()),
        "hessian_blocks": len(hessian.slices),
    }


def _refit(name: str, sublayer: FinishedSublayer, layer: FinishedLayer) -> FinishedLayer:
    try:
        refitted = refit_sublayer(sublayer, layer.form)
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
    return relative(lost, total)
