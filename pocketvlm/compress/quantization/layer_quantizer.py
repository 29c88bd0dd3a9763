"""One layer against what is known of its input: a calibrated form, judged beside a plain one.

Both are compared by what they do to the layer's outputs on tokens that neither was fitted to. The
plain form is kept where it is at least as good, and the layer's row says so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from pocketvlm.compress.layerwise.error_feedback import Factor
from pocketvlm.compress.layerwise.hessian import InputHessian, compare_outputs
from pocketvlm.compress.layerwise.layer_store import FinishedLayer
from pocketvlm.compress.layerwise.row_chunks import row_chunks
from pocketvlm.compress.quantization.affine.rules import Assignment, LayerRule
from pocketvlm.compress.quantization.layer_report import describe_layer
from pocketvlm.errors import CheckpointError
from pocketvlm.weights.form import WeightForm

__all__ = [
    "LayerQuantizer",
    "Weighed",
    "align_to_float",
    "fit_layer",
    "round_layer",
]

_NOT_POSITIVE = "the Cholesky factorization failed at every damping up to 1"
_NOT_BETTER = "plain rounding is at least as good on held-out tokens"


@dataclass(frozen=True, kw_only=True, eq=False)
class Weighed:
    """A layer's evidence for one width of grid.

    Attributes:
        evidence: Of its input.
        factors: One a diagonal block.
        drift_share: How much of the input's distance from the float model's is made up for.
    """

    evidence: InputHessian
    factors: tuple[Factor, ...]
    drift_share: float

    def targets(self, rows: Tensor) -> Tensor:
        """What rows of a weight should be rounded to, [rows, columns] in float64."""
        drift = self.evidence.drift
        if drift is None or self.drift_share == 0:
            return rows
        aligned = rows.clone()
        for part, factor, cross in zip(self.evidence.slices, self.factors, drift, strict=True):
            aligned[:, part] += self.drift_share * align_to_float(rows[:, part], factor, cross)
        return aligned


FitRuleT_contra = TypeVar("FitRuleT_contra", bound=LayerRule, contravariant=True)
FitRuleT = TypeVar("FitRuleT", bound=LayerRule)


class LayerQuantizer(Protocol[FitRuleT_contra]):
    """How the layers of one kind of rule are quantized."""

    @property
    def label(self) -> str:
        """Name of the calibrated method in reports."""

    @property
    def plain_label(self) -> str:
        """Name of the plain one."""

    def fit(self, rule: FitRuleT_contra, weight: WeightForm, weighed: Weighed) -> WeightForm:
        """The calibrated form of a weight.

        Raises:
            ValueError: The weight is too large for float16 scales.
        """

    def round(self, rule: FitRuleT_contra, weight: WeightForm) -> WeightForm:
        """The form of the same kind that needs no calibration.

        Raises:
            ValueError: The weight is too large for float16 scales.
        """


def align_to_float(rows: Tensor, factor: Factor, cross: Tensor) -> Tensor:
    """What to add to a weight so that it makes up for the drift of its input.

    GPTAQ (Li et al., arXiv 2504.02692) asks for min |W x_float - Q x_now|^2. With
    C = E[(x_float - x_now) x_now^T] and H = E[x_now x_now^T] that is
    min |(W + W C H^-1 - Q) x_now|^2 up to a constant, so error feedback on the moved target solves
    it; the paper derives updates column by column for the same objective. H^-1 = U^T U is that of
    the damped Hessian.

    Args:
        rows: W, float64 [rows, columns].
        factor: Of the columns' Hessian.
        cross: C, [columns, columns].

    Returns:
        W C H^-1, float64 [rows, columns].
    """
    columns = factor.order.columns
    moved = (rows @ cross.to(rows.dtype))[:, columns]
    solved = torch.empty_like(rows)
    solved[:, columns] = (moved @ factor.upper.T) @ factor.upper
    return solved


def fit_layer(
    assignment: Assignment[FitRuleT],
    weight: WeightForm,
    evidence: InputHessian,
    fitter: LayerQuantizer[FitRuleT],
    *,
    drift_share: float = 0.0,
    note: str = "",
) -> FinishedLayer:
    """Quantizes a layer, and describes what became of it.

    Args:
        assignment: The layer and its rule.
        weight: Its weight.
        evidence: Of its input.
        fitter: How layers of this kind are quantized.
        drift_share: How much of the input's distance from the float model's is made up for.
        note: The row's reason where nothing else has to be said.

    Raises:
        CheckpointError: The weight is too large for float16 scales.
    """
    started = time.perf_counter()
    name, rule = assignment.linear.name, assignment.rule
    if rule is None:
        raise ValueError(f"{name} is not to be quantized")
    found = evidence.factors[rule.grid_columns(assignment.linear)]
    factors = tuple(factor for factor in found if factor is not None)
    try:
        plain = fitter.round(rule, weight)
        form, method, reason = plain, fitter.plain_label, _NOT_POSITIVE
        if len(factors) == len(evidence.slices):
            weighed = Weighed(evidence=evidence, factors=factors, drift_share=drift_share)
            form, method, reason = fitter.fit(rule, weight, weighed), fitter.label, note
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error
    losses = compare_outputs(weight, form, plain, evidence)
    if form is not plain and not losses.fitted < losses.plain:
        form, method, reason = plain, fitter.plain_label, _NOT_BETTER
    lost = losses.plain_weight_error if form is plain else losses.fitted_weight_error
    row = describe_layer(
        assignment,
        form,
        method=method,
        plain=form is plain,
        reason=reason,
        weight_error=_share(lost, losses.weight),
        loss=_share(losses.fitted, losses.output),
        loss_rtn=_share(losses.plain, losses.output),
        judged_on=evidence.judged_on,
        tokens=evidence.tokens,
        damping=max((factor.damping for factor in factors), default=None),
        damping_raised=any(factor.damping > evidence.damping for factor in factors),
        dead_columns=int((evidence.importance <= 0).sum()),
        hessian_blocks=len(evidence.slices),
        seconds=time.perf_counter() - started,
    )
    return FinishedLayer(form=form, row=row)


def round_layer(
    assignment: Assignment[FitRuleT],
    weight: WeightForm,
    fitter: LayerQuantizer[FitRuleT],
    *,
    reason: str,
) -> FinishedLayer:
    """Gives a layer its plain form, for want of an input to fit, and describes it.

    Raises:
        CheckpointError: The weight is too large for float16 scales.
    """
    started = time.perf_counter()
    name, rule = assignment.linear.name, assignment.rule
    if rule is None:
        raise ValueError(f"{name} is not to be quantized")
    try:
        form = fitter.round(rule, weight)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error
    total = lost = 0.0
    for chosen, rows in row_chunks(weight):
        change = form.take_rows(torch.arange(chosen.start, chosen.stop)) - rows
        total += float(rows.square().sum())
        lost += float(change.square().sum())
    row = describe_layer(
        assignment,
        form,
        method=fitter.plain_label,
        plain=True,
        reason=reason,
        weight_error=_share(lost, total),
        seconds=time.perf_counter() - started,
    )
    return FinishedLayer(form=form, row=row)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
