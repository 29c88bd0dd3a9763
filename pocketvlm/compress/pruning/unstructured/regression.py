"""What is kept of a pruned weight, fitted again to what the float model computes.

A mask fixes which elements are zero; of all weights with these zeros one is nearest to the float
model's outputs. It is the least-squares solution of every row by itself, on the row's own columns:
SparseGPT (Frantar and Alistarh, arXiv 2301.00774, section 3.1) names it the optimal reconstruction
and avoids it, because each row would need the inverse of its own part of the Hessian. Conjugate
gradients need no inverse: all rows share one product with the Hessian per iteration, and what they
find is the same, to any tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketvlm.calibration.walk.moments import SecondMoment
from pocketvlm.calibration.walk.steps import FinishedSublayer
from pocketvlm.compress.layerwise.hessian import InputHessian
from pocketvlm.compress.layerwise.output_loss import compare_outputs
from pocketvlm.errors import CalibrationError
from pocketvlm.weights.float_weights import keeps_of, with_values
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.modules import FormLinear, cache_dense_weights

__all__ = [
    "Refitted",
    "SublayerStatistics",
    "aligned_targets",
    "fit_kept",
    "refit_layer",
    "refit_sublayer",
    "sublayer_statistics",
]

_DAMPING = 0.01
_ITERATIONS = 48
_TOLERANCE = 1e-3


def fit_kept(
    start: Tensor,
    keeps: Tensor,
    hessian: Tensor,
    targets: Tensor,
    *,
    damping: float = _DAMPING,
    iterations: int = _ITERATIONS,
    tolerance: float = _TOLERANCE,
) -> Tensor:
    """Minimises tr(V H V^T) - 2 tr(V T^T) over all V that are zero where the mask is false.

    That is the mean of |y - V x|^2 up to a constant, with H = E[x x^T] and T = E[y x^T]. Conjugate
    gradients with the diagonal as preconditioner, all rows at once; a row that is done stands
    still. The damping pulls V towards where it starts, so that directions without evidence keep
    their values.

    Args:
        start: Where rows start, [rows, columns] in float64; what lies outside of the mask is taken
            to be zero.
        keeps: The mask, bool [rows, columns].
        hessian: H, [columns, columns].
        targets: T, [rows, columns].
        damping: Share of H's mean diagonal that weighs the squared distance from the start.
        iterations: At most this many.
        tolerance: A row is done when its gradient, in the preconditioner's norm, has shrunk to
            this share.

    Returns:
        V, float64 [rows, columns]. No row's loss is larger than at the start.
    """
    mask = keeps.to(torch.float64)
    first = start.to(torch.float64) * mask
    H = hessian.to(torch.float64)
    pull = damping * float(H.diagonal().mean())
    diagonal = H.diagonal() + pull
    scale = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    wanted = targets.to(torch.float64)
    values = first.clone()
    residual = (wanted - values @ H) * mask
    begin = residual
    direction = residual * scale
    size = (residual * direction).sum(dim=1, keepdim=True)
    enough = size * tolerance**2
    for _ in range(iterations):
        active = size > enough
        if not bool(active.any()):
            break
        image = (direction @ H + pull * direction) * mask
        curvature = (direction * image).sum(dim=1, keepdim=True)
        step = torch.where(active & (curvature > 0), size / curvature, 0.0)
        values += step * direction
        residual = residual - step * image
        scaled = residual * scale
        former, size = size, (residual * scaled).sum(dim=1, keepdim=True)
        ratio = torch.where(active & (former > 0), size / former, 0.0)
        direction = scaled + ratio * direction
    change = values - first
    # f(V) - f(start) = tr(D H D^T) - 2 <D, T - start H>, by row.
    gained = ((change @ H) * change).sum(dim=1) - 2 * (change * begin).sum(dim=1)
    return torch.where((gained < 0)[:, None], values, first)


def aligned_targets(weight: Tensor, hessian: Tensor, drift: Tensor | None) -> Tensor:
    """T = E[y x^T] of a layer whose outputs should be the float model's, y = W x_float.

    With C = E[(x_float - x) x^T] that is W (H + C); see `layerwise.hessian.align_to_float`.

    Args:
        weight: W, float64 [rows, columns].
        hessian: H, [columns, columns].
        drift: C; `None` where the input has not moved.
    """
    H = hessian.to(weight.dtype)
    return weight @ (H if drift is None else H + drift.to(weight.dtype))


@dataclass(frozen=True, kw_only=True, eq=False)
class Refitted:
    """A masked weight after regression, or as it was where that helped nothing.

    Attributes:
        form: The weight.
        before: Loss as it was, relative to the float model's outputs.
        after: Loss of what regression found, rounded as it is stored.
        is_kept: Whether it is what `form` is.
        judged_on: Whose tokens the losses are of.
    """

    form: WeightForm
    before: float
    after: float
    is_kept: bool
    judged_on: str


def refit_layer(weight: WeightForm, pruned: WeightForm, hessian: InputHessian) -> Refitted:
    """Fits a pruned layer's outputs to those of the float layer on the float model's input.

    Args:
        weight: The float weight.
        pruned: What is kept of it.
        hessian: Of its input, with the drift from the float model's where that is known.

    Raises:
        UnsupportedError: A value grows too large for float16.
    """
    keeps = _mask_of(pruned)
    dense = weight.dequantize().to(torch.float64)
    values = pruned.dequantize().to(torch.float64)
    for number, (part, block) in enumerate(zip(hessian.slices, hessian.hessians, strict=True)):
        drift = None if hessian.drift is None else hessian.drift[number]
        targets = aligned_targets(dense[:, part], block, drift)
        values[:, part] = fit_kept(values[:, part], keeps[:, part], block, targets)
    fitted = with_values(pruned, values)
    losses = compare_outputs(weight, fitted, pruned, hessian)
    is_kept = losses.fitted < losses.plain
    return Refitted(
        form=fitted if is_kept else pruned,
        before=_share(losses.plain, losses.output),
        after=_share(losses.fitted, losses.output),
        is_kept=is_kept,
        judged_on=hessian.judged_on,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class SublayerStatistics:
    """What a sublayer's last linear reads, and what it should return.

    Attributes:
        hessian: Mean of x x^T, [columns, columns].
        targets: Mean of y x^T, [rows, columns], with y the float model's state after the sublayer
            less everything that the linear does not add itself: the state before it and its bias.
        energy: Mean of |y|^2.
    """

    hessian: Tensor
    targets: Tensor
    energy: float

    def loss(self, values: Tensor) -> float:
        """Mean of |y - V x|^2, relative to that of |y|^2."""
        V = values.to(torch.float64)
        found = (V @ self.hessian.to(torch.float64) * V).sum() - 2 * (V * self.targets).sum()
        return _share(max(float(found) + self.energy, 0.0), self.energy)


def sublayer_statistics(
    finished: FinishedSublayer,
) -> tuple[SublayerStatistics, SublayerStatistics | None]:
    """Statistics of a finished sublayer as it is now, fitted and held-out.

    Raises:
        CalibrationError: An input or a target is not finite.
    """
    found: dict[bool, _Sums] = {}
    linear = finished.sublayer.last_module
    bias = linear.bias if isinstance(linear, FormLinear) else None
    with torch.no_grad(), cache_dense_weights(finished.sublayer.linears):
        for index, batch in enumerate(finished.batches):
            if batch is None:
                continue
            states = finished.inputs[index]
            inputs = finished.sublayer.inputs_of_last(states, finished.rows_of(index))
            own = finished.sublayer.own
            wanted = own(finished.targets[index]) - own(states)
            if bias is not None:
                wanted = wanted - bias
            if batch.held_out not in found:
                found[batch.held_out] = _Sums(inputs.shape[-1], wanted.shape[-1])
            found[batch.held_out].add(inputs, wanted, finished.weights_of(index))
    held_out = found.get(True)
    return found[False].means(), None if held_out is None else held_out.means()


def refit_sublayer(finished: FinishedSublayer, form: WeightForm) -> Refitted:
    """Fits a sublayer's last linear so that the state after it is the float model's.

    What the sublayer's other layers and everything before them have lost is made up for as far as
    the last linear's mask allows.

    Args:
        finished: The sublayer; its layers are pruned.
        form: The last linear's pruned weight.

    Raises:
        CalibrationError: An input or a target is not finite.
        UnsupportedError: A value grows too large for float16.
    """
    fitted, held_out = sublayer_statistics(finished)
    judge = fitted if held_out is None else held_out
    values = form.dequantize().to(torch.float64)
    found = fit_kept(values, _mask_of(form), fitted.hessian, fitted.targets)
    after = with_values(form, found)
    losses = [judge.loss(weights.dequantize()) for weights in (form, after)]
    is_kept = losses[1] < losses[0]
    return Refitted(
        form=after if is_kept else form,
        before=losses[0],
        after=losses[1],
        is_kept=is_kept,
        judged_on="calibration tokens" if held_out is None else "held-out tokens",
    )


class _Sums:
    """Sums over tokens that become `SublayerStatistics`."""

    def __init__(self, columns: int, rows: int) -> None:
        self._moment = SecondMoment(columns)
        self._targets = torch.zeros(rows, columns, dtype=torch.float64)
        self._energy = 0.0

    def add(self, inputs: Tensor, wanted: Tensor, weights: Tensor | None) -> None:
        """Adds a batch: [..., columns], [..., rows] and, where tokens do not weigh alike, [...]."""
        self._moment.add(inputs, weights)
        flat, outputs = inputs.reshape(-1, inputs.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
        weighed = outputs if weights is None else outputs * weights.reshape(-1, 1)
        self._targets += weighed.T @ flat
        self._energy += float((weighed * outputs).sum(dtype=torch.float64))

    def means(self) -> SublayerStatistics:
        """The means."""
        (hessian,) = self._moment.blocks()
        total = self._moment.total_weight
        if not bool(torch.isfinite(self._targets).all()):
            raise CalibrationError("the float model's state after it is not finite")
        return SublayerStatistics(
            hessian=hessian, targets=self._targets / total, energy=self._energy / total
        )


def _mask_of(form: WeightForm) -> Tensor:
    keeps = keeps_of(form)
    return torch.ones(form.shape, dtype=torch.bool) if keeps is None else keeps


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
