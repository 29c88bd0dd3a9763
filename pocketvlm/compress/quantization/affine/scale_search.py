"""The search of AWQ: which scale of a layer's inputs makes rounding its weight cost least.

With D the change of the weights that rounding makes, the mean squared change of the outputs is
tr(D H D^T), H being the second moment of the inputs: every candidate is judged without running
the model again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketvlm.calibration.walk.moments import SecondMoment
from pocketvlm.calibration.walk.steps import InputMoments
from pocketvlm.compress.layerwise.row_chunks import keeps_in, row_chunks
from pocketvlm.compress.quantization.affine.grid import decode, encode, group_columns, min_max_grid
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.weights.form import WeightForm

__all__ = ["ScaleChoice", "candidate_scales", "choose_scale", "rounding_losses"]

# Channels that calibration never excites get the scale of one that is excited so little.
_FAINT = 1e-3
_NOT_LOWER = "no scale lowers the error"
_NOT_BETTER = "no scale lowers the error on held-out tokens"


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaleChoice:
    """The outcome of one search.

    Attributes:
        scale: Of the producer's outputs, float64; `None` where none is better than one.
        exponent: Its exponent.
        reason: Why there is no scale.
        figures: Losses by layer: squared change of its outputs relative to their squares, scaled
            (`loss`) and as it was (`loss_rtn`).
    """

    scale: Tensor | None
    exponent: float
    reason: str
    figures: Mapping[str, Mapping[str, Any]]


def candidate_scales(magnitudes: Tensor, points: int) -> Tensor:
    """Scales s = a^r / geometric mean, for `points` exponents r from 0 to 1 (equation 5).

    Args:
        magnitudes: Root mean square of each channel, a, [channels].
        points: Number of exponents.

    Returns:
        float64 [points, channels]; the first row is one.
    """
    values = magnitudes.to(torch.float64)
    floor = _FAINT * float(values.square().mean().sqrt())
    logs = values.clamp_min(floor).log() if floor > 0 else torch.zeros_like(values)
    exponents = torch.linspace(0, 1, points, dtype=torch.float64)
    return torch.exp(exponents[:, None] * (logs - logs.mean()))


def rounding_losses(
    form: WeightForm, rule: WeightRule, scales: Tensor, moment: SecondMoment
) -> Tensor:
    """Mean squared error of a layer's outputs under round-to-nearest, for each scale.

    Args:
        form: The weight W.
        rule: Bits and groups it is rounded to.
        scales: One candidate per row, [candidates, columns].
        moment: Of the inputs: H.

    Returns:
        float64 [candidates]: tr(D H D^T) with D = round(W s) / s - W.

    Raises:
        ValueError: A scaled weight has no float16 scale.
    """
    hessians = [block.to(torch.float32) for block in moment.blocks()]
    losses = torch.zeros(scales.shape[0], dtype=torch.float64)
    for rows, chunk in row_chunks(form):
        keeps = keeps_in(form, rows)
        for index, scale in enumerate(scales):
            scaled = (chunk * scale).to(torch.float32)
            error = (_round(scaled, rule, keeps) - scaled) / scale.to(torch.float32)
            losses[index] += _quadratic(error, moment, hessians)
    return losses


def choose_scale(
    layers: Mapping[str, tuple[WeightForm, WeightRule]],
    moments: InputMoments,
    channels: Tensor,
    points: int,
) -> ScaleChoice:
    """Searches on calibration tokens, and judges what was found on held-out ones."""
    fitted, judge = moments.calibration, moments.held_out or moments.calibration
    scales = candidate_scales(_magnitudes(fitted, channels), points)
    totals = sum(
        (
            rounding_losses(form, rule, scales[:, channels], fitted)
            for form, rule in layers.values()
        ),
        start=torch.zeros(points, dtype=torch.float64),
    )
    best = int(totals.argmin())
    pair = scales[[0, best]][:, channels]
    judged = {
        name: rounding_losses(form, rule, pair, judge) for name, (form, rule) in layers.items()
    }
    before, after = sum(judged.values(), start=torch.zeros(2, dtype=torch.float64)).tolist()
    is_better = best > 0 and after < before
    reason = "" if is_better else _NOT_LOWER if best == 0 else _NOT_BETTER
    figures = {}
    for name, (form, _) in layers.items():
        energy = _output_energy(form, judge)
        plain, scaled = (judged[name] / energy if energy > 0 else judged[name]).tolist()
        figures[name] = {
            "loss": scaled if is_better else plain,
            "loss_rtn": plain,
            "judged_on": "held-out tokens" if moments.held_out else "calibration tokens",
            "tokens": fitted.tokens,
        }
    return ScaleChoice(
        scale=scales[best] if is_better else None,
        exponent=best / (points - 1) if is_better else 0.0,
        reason=reason,
        figures=figures,
    )


def _magnitudes(moment: SecondMoment, channels: Tensor) -> Tensor:
    """Root mean square of each output of the producer, over tokens and the columns it feeds."""
    squares = torch.cat([block.diagonal() for block in moment.blocks()]).to(torch.float64)
    counts = torch.bincount(channels)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, channels, squares)
    return (sums / counts).sqrt()


def _round(weight: Tensor, rule: WeightRule, keeps: Tensor | None) -> Tensor:
    """Round-to-nearest as the rule has it, [rows, columns], under a mask where there is one."""
    size = rule.columns_a_group(weight.shape[1])
    groups = group_columns(weight, size)
    kept = None if keeps is None else group_columns(keeps, size)
    grid = min_max_grid(groups, rule.scheme, keeps=kept)
    rounded = decode(encode(groups, grid), grid).reshape(len(weight), -1)[:, : weight.shape[1]]
    return rounded if keeps is None else rounded.masked_fill(~keeps, 0.0)


def _quadratic(rows: Tensor, moment: SecondMoment, hessians: Sequence[Tensor]) -> Tensor:
    """tr(D H D^T) of some rows D, a float64 scalar."""
    total = torch.zeros((), dtype=torch.float64)
    for part, H in zip(moment.slices, hessians, strict=True):
        D = rows[:, part]
        total += (D @ H).mul_(D).sum(dtype=torch.float64)
    return total


def _output_energy(form: WeightForm, moment: SecondMoment) -> float:
    hessians = [block.to(torch.float32) for block in moment.blocks()]
    return sum(
        float(_quadratic(chunk.to(torch.float32), moment, hessians))
        for _, chunk in row_chunks(form)
    )
