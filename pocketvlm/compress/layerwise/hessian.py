"""What is known of a layer's input, for whoever quantizes the layer or drops weights of it.

Second moments of calibration tokens, factorized for error feedback, and those of held-out tokens,
on which results are judged: by what they do to the layer's outputs, exactly, without running the
model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketvlm.calibration.walk.walk import Drift, InputMoments
from pocketvlm.compress.layerwise.error_feedback import Factor, Order, factorize
from pocketvlm.compress.layerwise.row_chunks import row_chunks
from pocketvlm.errors import CalibrationError
from pocketvlm.weights.form import WeightForm

__all__ = [
    "InputHessian",
    "OutputLosses",
    "compare_outputs",
    "diagonal_block_width",
    "weigh_moments",
]

# Up to this width a Hessian is kept whole; wider inputs, such as those of a projector behind a
# pixel shuffle, keep diagonal blocks of the smaller width.
_WHOLE_WIDTH = 8192
_BLOCK_WIDTH = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class InputHessian:
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


def weigh_moments(
    moments: InputMoments,
    grid_columns: Sequence[int],
    *,
    damping: float,
    order: Order,
    lookup_share: float = 0.0,
) -> InputHessian:
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
    return InputHessian(
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


def diagonal_block_width(width: int, columns: Sequence[int]) -> int | None:
    """Width of the diagonal blocks that are kept of a wide Hessian; `None` keeps it whole.

    Args:
        width: Columns of the layer.
        columns: Columns of groups that no border between blocks may cut.
    """
    if width <= _WHOLE_WIDTH:
        return None
    # A grid as wide as the layer has no borders that a block could cut.
    step = math.lcm(*(count for count in columns if count < width))
    return min(width, max(1, _BLOCK_WIDTH // step) * step)


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
    weight: WeightForm, fitted: WeightForm, plain: WeightForm, evidence: InputHessian
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
