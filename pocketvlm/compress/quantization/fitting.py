"""One layer against its Hessian: error feedback, judged beside round-to-nearest.

Both results are compared by what they do to the layer's outputs on tokens that neither was fitted
to. Round-to-nearest is kept where it is at least as good, and the layer's row says so.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketvlm.calibration.blocks import InputMoments
from pocketvlm.compress.quantization.affine import (
    GRIDS,
    Grid,
    GridKind,
    affine_form,
    decode,
    encode,
    group_columns,
)
from pocketvlm.compress.quantization.error_feedback import (
    Factor,
    Order,
    factorize,
    quantize_with_feedback,
)
from pocketvlm.compress.quantization.layers import FinishedLayer, describe_layer, row_chunks
from pocketvlm.compress.quantization.rtn import round_layer
from pocketvlm.compress.quantization.rules import Assignment, WeightRule
from pocketvlm.errors import CalibrationError, CheckpointError
from pocketvlm.weights import AffineWeight, WeightForm

__all__ = ["Evidence", "fit_layer", "weigh_moments"]

_NOT_POSITIVE = "the Cholesky factorization failed at every damping up to 1"
_NOT_BETTER = "round-to-nearest is at least as good on held-out tokens"


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What is known of one input.

    Attributes:
        slices: Columns of each diagonal block of the Hessian.
        factors: The blocks' factors by group size; `None` for one that could not be factorized.
        judge: The blocks of the Hessian that results are compared on.
        judged_on: Whose tokens those are.
        tokens: Tokens behind the factors.
        damping: The damping that was asked for.
    """

    slices: tuple[slice, ...]
    factors: Mapping[int, Sequence[Factor | None]]
    judge: tuple[Tensor, ...]
    judged_on: str
    tokens: int
    damping: float


def weigh_moments(
    moments: InputMoments, group_sizes: Sequence[int], *, damping: float, order: Order
) -> Evidence:
    """Factorizes an input's second moment once for each group size.

    Raises:
        CalibrationError: It holds values that are not finite, or no token was seen.
    """
    fitted, held_out = moments.calibration, moments.held_out
    blocks = fitted.blocks()
    if not all(bool(torch.isfinite(block).all()) for block in blocks):
        raise CalibrationError("the second moment of its inputs is not finite")
    return Evidence(
        slices=fitted.slices,
        factors={
            size: [
                factorize(block, group_size=size, damping=damping, order=order) for block in blocks
            ]
            for size in group_sizes
        },
        judge=(held_out or fitted).blocks(),
        judged_on="held-out tokens" if held_out else "calibration tokens",
        tokens=fitted.tokens,
        damping=damping,
    )


def fit_layer(
    assignment: Assignment,
    weight: WeightForm,
    evidence: Evidence,
    *,
    grid: GridKind,
    static_groups: bool,
    note: str = "",
) -> FinishedLayer:
    """Quantizes a layer, and describes what became of it.

    Args:
        assignment: The layer and its rule.
        weight: Its weight.
        evidence: Of its input.
        grid: How a group's grid is found.
        static_groups: Whether grids are made before the first column is rounded.
        note: The row's reason where nothing else has to be said.

    Raises:
        CheckpointError: The weight is too large for float16 scales.
    """
    started = time.perf_counter()
    name, rule = assignment.linear.name, assignment.rule
    if rule is None:
        raise ValueError(f"{name} is not to be quantized")
    factors = [factor for factor in evidence.factors[rule.group_size] if factor is not None]
    if len(factors) < len(evidence.slices):
        return round_layer(assignment, weight, grid, reason=_NOT_POSITIVE)
    losses = _Losses()
    try:
        form = _feed_back(weight, factors, evidence, rule, grid, static_groups, losses)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error
    figures: dict[str, Any] = {
        "method": "gptq",
        "reason": note,
        "weight_error": _share(losses.weight_error, losses.weight),
    }
    if not losses.fitted < losses.rounded:
        rounded = round_layer(assignment, weight, grid)
        form = rounded.form
        figures = {
            "method": "rtn",
            "reason": _NOT_BETTER,
            "weight_error": rounded.row["weight_error"],
        }
    row = describe_layer(
        assignment,
        form,
        **figures,
        loss=_share(losses.fitted, losses.output),
        loss_rtn=_share(losses.rounded, losses.output),
        judged_on=evidence.judged_on,
        tokens=evidence.tokens,
        damping=max(factor.damping for factor in factors),
        damping_raised=any(factor.damping > evidence.damping for factor in factors),
        dead_columns=sum(factor.dead for factor in factors),
        hessian_blocks=len(factors),
        seconds=time.perf_counter() - started,
    )
    return FinishedLayer(form=form, row=row)


class _Losses:
    """Sums over the rows of a layer, of squares of weights and of outputs a token.

    With D the change of the weights, the mean squared change of the outputs is tr(D H D^T): exact
    for the tokens that H was taken from.
    """

    def __init__(self) -> None:
        self.weight = self.weight_error = 0.0
        self.output = self.fitted = self.rounded = 0.0

    def add(self, rows: Tensor, fitted: Tensor, rounded: Tensor, evidence: Evidence) -> None:
        self.weight += float(rows.square().sum())
        self.weight_error += float((fitted - rows).square().sum())
        for part, hessian in zip(evidence.slices, evidence.judge, strict=True):
            H = hessian.to(torch.float32)
            self.output += _quadratic(rows[:, part], H)
            self.fitted += _quadratic((fitted - rows)[:, part], H)
            self.rounded += _quadratic((rounded - rows)[:, part], H)


def _feed_back(
    weight: WeightForm,
    factors: Sequence[Factor],
    evidence: Evidence,
    rule: WeightRule,
    grid: GridKind,
    static_groups: bool,
    losses: _Losses,
) -> AffineWeight:
    """Rounds all rows, some at a time, and adds up what that and plain rounding would cost."""
    if rule.bits is None:
        raise ValueError("the rule has no bits")
    codes, scales, zeros = [], [], []
    for _, rows in row_chunks(weight):
        pieces = [
            quantize_with_feedback(
                rows[:, part],
                factor,
                bits=rule.bits,
                group_size=rule.group_size,
                symmetric=rule.symmetric,
                grid=grid,
                static_groups=static_groups,
            )
            for part, factor in zip(evidence.slices, factors, strict=True)
        ]
        chosen = torch.cat([piece for piece, _ in pieces], dim=1)
        found = Grid(
            scale=torch.cat([piece.scale for _, piece in pieces], dim=1),
            zero=torch.cat([piece.zero for _, piece in pieces], dim=1),
            bits=rule.bits,
        )
        groups = group_columns(rows, rule.group_size)
        nearest = GRIDS[grid](groups, rule.bits, symmetric=rule.symmetric)
        fitted = decode(chosen.view(groups.shape), found)
        rounded = decode(encode(groups, nearest), nearest)
        losses.add(rows, _flat(fitted, rows), _flat(rounded, rows), evidence)
        codes.append(chosen.to(torch.uint8))
        scales.append(found.scale)
        zeros.append(found.zero)
    return affine_form(
        torch.cat(codes),
        Grid(scale=torch.cat(scales), zero=torch.cat(zeros), bits=rule.bits),
        group_size=rule.group_size,
        in_features=weight.shape[1],
        symmetric=rule.symmetric,
    )


def _quadratic(rows: Tensor, hessian: Tensor) -> float:
    narrow = rows.to(torch.float32)
    return float((narrow @ hessian).mul_(narrow).sum(dtype=torch.float64))


def _flat(groups: Tensor, rows: Tensor) -> Tensor:
    return groups.reshape(rows.shape[0], -1)[:, : rows.shape[1]]


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
