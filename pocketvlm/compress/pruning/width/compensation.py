"""Closed-form repairs of a linear that loses some of its inputs: a bias, or new survivors.

FLAP (arXiv 2312.11983, section 3.3) keeps what a removed input contributes on average: the mean of
W_R x_R moves into the bias. That is the best constant; here the best affine function of the inputs
that stay can be taken instead, which is least squares on the mean-centred inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pocketvlm.calibration.walk.moments import SecondMoment
from pocketvlm.errors import CalibrationError

__all__ = [
    "Compensated",
    "Compensation",
    "InputStatistics",
    "compensate",
    "mean_shift",
    "output_energy",
    "output_loss",
    "refit_survivors",
    "removed_mean",
]

Compensation = Literal["none", "bias", "regression"]

_LARGEST_DAMPING = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class InputStatistics:
    """Mean and covariance of a linear's inputs.

    Attributes:
        mean: float64 [columns].
        slices: Columns of each diagonal block of the covariance; mostly a single one.
        covariance: The blocks, float64.
        is_centred: Whether `mean` was taken off; where not, it is zero and the blocks are second
            moments.
    """

    mean: Tensor
    slices: tuple[slice, ...]
    covariance: tuple[Tensor, ...]
    is_centred: bool

    @classmethod
    def from_moment(cls, moment: SecondMoment, *, centred: bool) -> InputStatistics:
        """Statistics of what was seen.

        Args:
            moment: The second moment.
            centred: Whether a bias can take up the mean. For a linear without one the raw moments
                are what a sum of squared errors is made of.

        Raises:
            CalibrationError: No token was seen, or a value is not finite.
        """
        mean = moment.mean()
        blocks = tuple(block.to(torch.float64) for block in moment.blocks())
        if not all(bool(torch.isfinite(block).all()) for block in blocks):
            raise CalibrationError("the second moment of its inputs is not finite")
        if not centred:
            return cls(
                mean=torch.zeros_like(mean),
                slices=moment.slices,
                covariance=blocks,
                is_centred=False,
            )
        return cls(
            mean=mean,
            slices=moment.slices,
            covariance=tuple(
                block - torch.outer(mean[part], mean[part])
                for part, block in zip(moment.slices, blocks, strict=True)
            ),
            is_centred=True,
        )

    @property
    def variance(self) -> Tensor:
        """Variance of every input, float64 [columns]; rounding may not make it negative."""
        return torch.cat([block.diagonal() for block in self.covariance]).clamp_min(0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Compensated:
    """What is left of a linear.

    Attributes:
        weight: float64 [rows, kept columns].
        shift: What is added to the bias, float64 [rows]; `None` for nothing.
        damping: Share of the mean variance that was added to the covariance; `None` where nothing
            was solved.
    """

    weight: Tensor
    shift: Tensor | None
    damping: float | None


def removed_mean(weight: Tensor, mean: Tensor, kept: Tensor) -> Tensor:
    """W_R E[x_R]: what removed inputs contribute on average (FLAP, equation 6), [rows].

    Args:
        weight: W, float64 [rows, columns].
        mean: E[x], float64 [columns].
        kept: Columns that stay, int64.
    """
    removed = torch.ones(len(mean), dtype=torch.bool)
    removed[kept] = False
    return weight[:, removed] @ mean[removed]


def refit_survivors(
    weight: Tensor, statistics: InputStatistics, kept: Tensor, damping: float
) -> tuple[Tensor, float]:
    """W_S + W_R C_RS (C_SS + d I)^-1, the survivors that make up for what was removed.

    It minimizes E|W_R x_R - D x_S|^2 + d |D|^2 over the change D of the survivors, inputs centred,
    so that damping pulls towards the weights as they are. Of a covariance in diagonal blocks each
    is solved by itself.

    Args:
        weight: W, float64 [rows, columns].
        statistics: Of its inputs.
        kept: Columns that stay, ascending, int64.
        damping: d as a share of the mean variance of those columns; raised tenfold while the
            factorization fails.

    Returns:
        The new weight, float64 [rows, kept], and the largest damping used.

    Raises:
        CalibrationError: No damping up to 1 makes the covariance positive.
    """
    stays = torch.zeros(weight.shape[1], dtype=torch.bool)
    stays[kept] = True
    fitted = weight.clone()
    used = damping
    for part, covariance in zip(statistics.slices, statistics.covariance, strict=True):
        inside = stays[part]
        if not bool(inside.any()) or bool(inside.all()):
            continue
        columns = weight[:, part]
        factor, share = _factorize(covariance[inside][:, inside], damping)
        if factor is None:  # inputs that never vary: nothing can be learnt from them
            continue
        used = max(used, share)
        missing = columns[:, ~inside] @ covariance[~inside][:, inside]
        change = torch.cholesky_solve(missing.T, factor).T
        places = torch.arange(part.start, part.stop)[inside]
        fitted[:, places] += change
    return fitted[:, kept], used


def compensate(
    weight: Tensor,
    statistics: InputStatistics,
    kept: Tensor,
    how: Compensation,
    damping: float,
) -> Compensated:
    """The linear that reads the kept columns alone.

    Args:
        weight: W, float64 [rows, columns].
        statistics: Of its inputs.
        kept: Columns that stay, ascending, int64.
        how: `none` leaves them as they are, `bias` adds the mean of what is gone, `regression`
            also changes them.
        damping: See `refit_survivors`.

    Raises:
        CalibrationError: The covariance cannot be factorized.
    """
    if how == "none":
        return Compensated(weight=weight[:, kept], shift=None, damping=None)
    if how == "bias":
        shift = removed_mean(weight, statistics.mean, kept) if statistics.is_centred else None
        return Compensated(weight=weight[:, kept], shift=shift, damping=None)
    fitted, used = refit_survivors(weight, statistics, kept, damping)
    return Compensated(
        weight=fitted,
        shift=mean_shift(weight, fitted, statistics.mean, kept) if statistics.is_centred else None,
        damping=used,
    )


def mean_shift(weight: Tensor, fitted: Tensor, mean: Tensor, kept: Tensor) -> Tensor:
    """W E[x] - W' E[x_S]: the bias with which a changed linear keeps its mean output, [rows]."""
    return weight @ mean - fitted @ mean[kept]


def output_loss(
    weight: Tensor,
    fitted: Tensor,
    shift: Tensor | None,
    statistics: InputStatistics,
    kept: Tensor,
) -> float:
    """E|W x - W' x_S - s|^2, from the moments alone.

    Args:
        weight: W, float64 [rows, columns].
        fitted: W', float64 [rows, kept].
        shift: s, float64 [rows]; `None` for zero.
        statistics: Of the inputs.
        kept: Columns that stay, int64.
    """
    change = weight.clone()
    change[:, kept] -= fitted
    offset = change @ statistics.mean
    if shift is not None:
        offset = offset - shift
    return _energy(change, statistics) + float(offset.square().sum())


def output_energy(weight: Tensor, statistics: InputStatistics) -> float:
    """E|W x|^2, what a loss is compared with."""
    return output_loss(weight, weight[:, :0], None, statistics, torch.zeros(0, dtype=torch.int64))


def _energy(weight: Tensor, statistics: InputStatistics) -> float:
    pairs = zip(statistics.slices, statistics.covariance, strict=True)
    total = sum(float(((weight[:, part] @ C) * weight[:, part]).sum()) for part, C in pairs)
    return max(0.0, total)


def _factorize(matrix: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """Cholesky factor of a damped covariance and the damping; no factor where all of it is zero."""
    mean = float(matrix.diagonal().mean())
    if mean <= 0:
        return None, damping
    share = damping
    while share <= _LARGEST_DAMPING:
        damped = matrix + share * mean * torch.eye(len(matrix), dtype=matrix.dtype)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return factor, share
        share = max(share * 10, 1e-6)
    raise CalibrationError(
        "the covariance of its inputs cannot be factorized at any damping up to 1"
    )
