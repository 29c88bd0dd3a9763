"""What a compressed weight does to its layer's outputs, exactly, without running the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketvlm.compress.layerwise.hessian import InputHessian
from pocketvlm.compress.layerwise.row_chunks import row_chunks
from pocketvlm.weights.form import WeightForm

__all__ = ["OutputLosses", "compare_outputs"]


@dataclass(kw_only=True)
class OutputLosses:
    """Sums over the rows of a layer, of squares of weights and of outputs per token."""

    weight: float = 0.0
    fitted_weight_error: float = 0.0
    plain_weight_error: float = 0.0
    output: float = 0.0
    fitted: float = 0.0
    plain: float = 0.0


def compare_outputs(
    weight: WeightForm, fitted: WeightForm, plain: WeightForm, hessian: InputHessian
) -> OutputLosses:
    """What two forms do to a layer's outputs, exactly, for the tokens of the judging moments.

    With D = Q - W, the mean squared change of the outputs is tr(D H D^T); where the input itself
    has moved from the float model's by d, it is tr(D H D^T) - 2 tr(W C D^T) + tr(W E[d d^T] W^T).
    """
    losses = OutputLosses()
    for chosen, rows in row_chunks(weight, hessian.device):
        places = torch.arange(chosen.start, chosen.stop)
        losses.weight += float(rows.square().sum())
        narrow = rows.to(torch.float32)
        changes = [form.take_rows(places).to(rows.device) - narrow for form in (fitted, plain)]
        losses.fitted_weight_error += float(changes[0].square().sum(dtype=torch.float64))
        losses.plain_weight_error += float(changes[1].square().sum(dtype=torch.float64))
        for number, part in enumerate(hessian.slices):
            H = hessian.judge[number].to(torch.float32)
            original = narrow[:, part]
            losses.output += _inner(original @ H, original)
            constant, moved = 0.0, None
            if hessian.judge_drift is not None:
                cross, own = (means[number].to(torch.float32) for means in hessian.judge_drift)
                constant, moved = _inner(original @ own, original), original @ cross
            fitted_loss, plain_loss = (
                _inner(change[:, part] @ H, change[:, part])
                - (0.0 if moved is None else 2 * _inner(moved, change[:, part]))
                + constant
                for change in changes
            )
            losses.fitted += fitted_loss
            losses.plain += plain_loss
    return losses


def _inner(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum(dtype=torch.float64))
