"""One layer against its input: a calibrated form, judged beside a plain one.

Both are compared by what they do to the layer's outputs on tokens that neither was fitted to. The
plain form is kept where it is at least as good, and the layer's row says so.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from pocketvlm.compress.layerwise.driver import LayerMethod
from pocketvlm.compress.layerwise.error_feedback import Factor
from pocketvlm.compress.layerwise.hessian import InputHessian
from pocketvlm.compress.layerwise.layer_store import FinishedLayer
from pocketvlm.compress.layerwise.output_loss import compare_outputs
from pocketvlm.compress.layerwise.report import relative
from pocketvlm.compress.layerwise.row_chunks import row_chunks
from pocketvlm.compress.quantization.layer_report import describe_quantized
from pocketvlm.compress.quantization.rules import Assignment, LayerRule
from pocketvlm.errors import CheckpointError
from pocketvlm.models.layers import LinearSpec
from pocketvlm.weights.form import WeightForm

__all__ = ["LayerQuantizer"]

_NOT_POSITIVE = "the Cholesky factorization failed at every damping up to 1"
_NOT_BETTER = "plain rounding is at least as good on held-out tokens"
_LOOKUP = "a lookup has no inputs to fit: each row is rounded by itself"
_TIED = "head and embedding are one weight; fitted to the head's inputs and to being looked up"

RuleT = TypeVar("RuleT", bound=LayerRule)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerQuantizer(LayerMethod[Assignment[RuleT]]):
    """Quantizes layers under rules of one kind; a subclass says how a weight is rounded."""

    @abstractmethod
    def fit(
        self, rule: RuleT, linear: LinearSpec, weight: WeightForm, hessian: InputHessian
    ) -> WeightForm:
        """The calibrated form of a weight, against a Hessian whose factors are known.

        Raises:
            ValueError: The weight is too large for float16 scales.
        """

    @abstractmethod
    def round(self, rule: RuleT, linear: LinearSpec, weight: WeightForm) -> WeightForm:
        """The form of the same kind that needs no calibration.

        Raises:
            ValueError: The weight is too large for float16 scales.
        """

    @abstractmethod
    def labels(self, rule: RuleT, linear: LinearSpec) -> tuple[str, str]:
        """Names in reports of the calibrated method and of the plain one."""

    def columns_together(self, task: Assignment[RuleT]) -> int | None:
        """Columns that share a grid."""
        return None if task.rule is None else task.rule.grid_columns(task.linear)

    def compress(
        self, task: Assignment[RuleT], weight: WeightForm, hessian: InputHessian | None
    ) -> FinishedLayer:
        """Quantizes a layer, and describes what became of it.

        Without a Hessian it gets its plain form.

        Raises:
            CheckpointError: The weight is too large for float16 scales.
        """
        started = time.perf_counter()
        linear, rule = task.linear, task.rule
        if rule is None:
            raise ValueError(f"{linear.name} is not to be quantized")
        width = rule.grid_columns(linear)
        try:
            plain = form = self.round(rule, linear, weight)
            if hessian is not None and None not in hessian.factorize(width):
                form = self.fit(rule, linear, weight, hessian)
        except ValueError as error:
            raise CheckpointError(f"{linear.name}: {error}") from error
        if hessian is None:
            figures = _alone(weight, plain)
        else:
            form, figures = _choose(weight, form, plain, hessian, hessian.factorize(width))
        calibrated, rounded = self.labels(rule, linear)
        row = describe_quantized(
            task,
            form,
            method=rounded if form is plain else calibrated,
            plain=form is plain,
            **figures,
            seconds=time.perf_counter() - started,
        )
        return FinishedLayer(form=form, row=row)


def _choose(
    weight: WeightForm,
    fitted: WeightForm,
    plain: WeightForm,
    hessian: InputHessian,
    factors: Sequence[Factor | None],
) -> tuple[WeightForm, dict[str, Any]]:
    """The better of both forms on tokens that neither was fitted to, and the figures of its row."""
    losses = compare_outputs(weight, fitted, plain, hessian)
    form, reason = fitted, _TIED if hessian.lookup_share else ""
    if fitted is plain:
        reason = _NOT_POSITIVE
    elif not losses.fitted < losses.plain:
        form, reason = plain, _NOT_BETTER
    lost = losses.plain_weight_error if form is plain else losses.fitted_weight_error
    used = [factor.damping for factor in factors if factor is not None]
    return form, {
        "reason": reason,
        "weight_error": relative(lost, losses.weight),
        "loss": relative(losses.fitted, losses.output),
        "loss_rtn": relative(losses.plain, losses.output),
        "judged_on": hessian.judged_on,
        "tokens": hessian.tokens,
        "damping": max(used, default=None),
        "damping_raised": any(damping > hessian.feedback.damping for damping in used),
        "dead_columns": int((hessian.importance <= 0).sum()),
        "hessian_blocks": len(hessian.slices),
    }


def _alone(weight: WeightForm, form: WeightForm) -> dict[str, Any]:
    """Figures of a layer that has no inputs to fit."""
    total = lost = 0.0
    for chosen, rows in row_chunks(weight):
        change = form.take_rows(torch.arange(chosen.start, chosen.stop)) - rows
        total += float(rows.square().sum())
        lost += float(change.square().sum())
    return {"reason": _LOOKUP, "weight_error": relative(lost, total)}
