"""One layer against what is known of its input: a calibrated form, judged beside a plain one.

Both are compared by what they do to the layer's outputs on tokens that neither was fitted to. The
plain form is kept where it is at least as good, and the layer's row says so.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from pocketvlm.calibration.blocks import Drift, InputMoments
from pocketvlm.compress.quantization.error_feedback import Factor, Order, factorize
from pocketvlm.compress.quantization.layers import FinishedLayer, describe_layer, row_chunks
from pocketvlm.compress.quantization.rules import Assignment, LayerRule
from pocketvlm.errors import CalibrationError, CheckpointError
from pocketvlm.weights import WeightForm

__all__ = [
    "Evidence",
    "Fitter",
    "OutputLosses",
    "Weighed",
    "align_to_float",
    "compare_outputs",
    "fit_layer",
    "round_layer",
    "weigh_moments",
]

_NOT_POSITIVE = "the Cholesky factorization failed at every damping up to 1"
_NOT_BETTER = "plain rounding is at least as good on held-out tokens"


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What is known of one input, in diagonal blocks; most inputs have a single one.

    Attributes:
        slices: Columns of each block.
        hessians: Blocks of the Hessian that methods fit.
        factors: Their factors by grid width; `None` for one that could not be factorized.
        drift: Means of d x^T with d the input's distance from the float model's; `None` where
            that is not followed.
        judge: Blocks of the Hessian that results are compared on.
        judge_drift: Means of d x^T and of d d^T on the same tokens.
        judged_on: Whose tokens those are.
        tokens: Tokens behind the factors.
        damping: The damping that was asked for.
    """

    slices: tuple[slice, ...]
    hessians: tuple[Tensor, ...]
    factors: Mapping[int, Sequence[Factor | None]]
    drift: tuple[Tensor, ...] | None
    judge: tuple[Tensor, ...]
    judge_drift: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None
    judged_on: str
    tokens: int
    damping: float

    @property
    def importance(self) -> Tensor:
        """Diagonal of the Hessian: how much an error in each column counts, float64 [columns]."""
        return torch.cat([H.diagonal().to(torch.float64) for H in self.hessians])


@dataclass(frozen=True, kw_only=True, eq=False)
class Weighed:
    """A layer's evidence for one width of grid.

    Attributes:
        evidence: Of its input.
        factors: One a diagonal block.
        drift_share: How much of the input's distance from the float model's is made up for.
    """

    evidence: Evidence
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


class Fitter(Protocol[FitRuleT_contra]):
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


def weigh_moments(
    moments: InputMoments,
    grid_columns: Sequence[int],
    *,
    damping: float,
    order: Order,
    lookup_share: float = 0.0,
) -> Evidence:
    """Factorizes an input's second moment once for each width of grid.

    Args:
        moments: The moments.
        grid_columns: Widths of grid.
        damping: Share of the mean diagonal that is added to a factorized Hessian.
        order: Processing order.
        lookup_share: For a weight whose rows are also looked up, as those of a tied head are: how
            much an error of a looked-up element counts beside one of an output, whose Hessian is
            scaled to a mean diagonal of one.

    Raises:
        CalibrationError: It holds values that are not finite, or no token was seen.
    """
    fitted, held_out = moments.calibration, moments.held_out
    blocks = _add_lookups(fitted.blocks(), lookup_share)
    if not all(bool(torch.isfinite(block).all()) for block in blocks):
        raise CalibrationError("the second moment of its inputs is not finite")
    judging = moments.held_out_drift if held_out else moments.drift
    return Evidence(
        slices=fitted.slices,
        hessians=blocks,
        factors={
            width: [
                factorize(block, group_size=width, damping=damping, order=order) for block in blocks
            ]
            for width in grid_columns
        },
        drift=None if moments.drift is None else moments.drift.cross.blocks(),
        judge=_add_lookups(held_out.blocks(), lookup_share) if held_out else blocks,
        judge_drift=None if judging is None else _means(judging),
        judged_on="held-out tokens" if held_out else "calibration tokens",
        tokens=fitted.tokens,
        damping=damping,
    )


def fit_layer(
    assignment: Assignment[FitRuleT],
    weight: WeightForm,
    evidence: Evidence,
    fitter: Fitter[FitRuleT],
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
    assignment: Assignment[FitRuleT], weight: WeightForm, fitter: Fitter[FitRuleT], *, reason: str
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


@dataclass(kw_only=True)
class OutputLosses:
    """Sums over the rows of a layer, of squares of weights and of outputs a token."""

    weight: float = 0.0
    fitted_weight_error: float = 0.0
    plain_weight_error: float = 0.0
    output: float = 0.0
    fitted: float = 0.0
    plain: float = 0.0


def compare_outputs(
    weight: WeightForm, fitted: WeightForm, plain: WeightForm, evidence: Evidence
) -> OutputLosses:
    """What two forms do to a layer's outputs, exactly, for the tokens of the judging moments.

    With D = Q - W, the mean squared change of the outputs is tr(D H D^T); where the input itself
    has moved from the float model's by d, it is tr(D H D^T) - 2 tr(W C D^T) + tr(W E[d d^T] W^T).
    """
    losses = OutputLosses()
    for chosen, rows in row_chunks(weight):
        places = torch.arange(chosen.start, chosen.stop)
        losses.weight += float(rows.square().sum())
        narrow = rows.to(torch.float32)
        changes = [form.take_rows(places) - narrow for form in (fitted, plain)]
        losses.fitted_weight_error += float(changes[0].square().sum(dtype=torch.float64))
        losses.plain_weight_error += float(changes[1].square().sum(dtype=torch.float64))
        for number, part in enumerate(evidence.slices):
            H = evidence.judge[number].to(torch.float32)
            original = narrow[:, part]
            losses.output += _inner(original @ H, original)
            constant, moved = 0.0, None
            if evidence.judge_drift is not None:
                cross, own = (means[number].to(torch.float32) for means in evidence.judge_drift)
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


def _add_lookups(blocks: tuple[Tensor, ...], share: float) -> tuple[Tensor, ...]:
    """Hessians of outputs and, beside them, of the rows themselves."""
    if share == 0:
        return blocks
    mean = float(torch.cat([block.diagonal() for block in blocks]).mean())
    return tuple(
        block + share * mean * torch.eye(block.shape[0], dtype=block.dtype) for block in blocks
    )


def _means(drift: Drift) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return drift.cross.blocks(), drift.own.blocks()


def _inner(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum(dtype=torch.float64))


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
