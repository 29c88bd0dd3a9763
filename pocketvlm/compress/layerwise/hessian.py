"""Input statistics of a layer: what quantizers and pruners of the layer fit, and are judged on.

Second moments of calibration tokens, factorized for error feedback where a method asks for it, and
those of held-out tokens, on which results are judged (`output_loss`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pocketvlm.calibration.walk.moments import Int8Steps
from pocketvlm.calibration.walk.steps import Drift, InputMoments
from pocketvlm.compress.layerwise.error_feedback import Factor, Order, factorize
from pocketvlm.errors import CalibrationError

__all__ = [
    "NO_FEEDBACK",
    "ErrorFeedback",
    "InputHessian",
    "align_to_float",
    "diagonal_block_width",
]

# Up to this width a Hessian is kept whole; wider inputs, such as those of a projector after a
# pixel shuffle, keep diagonal blocks of the smaller width.
_WHOLE_WIDTH = 8192
_BLOCK_WIDTH = 1024


@dataclass(frozen=True, kw_only=True)
class ErrorFeedback:
    """How columns make up for each other's errors, and for those of the layers before.

    Attributes:
        damping: Share of a Hessian's mean diagonal that is added before it is factorized.
        order: In which order columns are processed.
        drift_share: How much of the input's distance from the float model's is made up for.
    """

    damping: float = 0.0
    order: Order = "natural"
    drift_share: float = 0.0


NO_FEEDBACK = ErrorFeedback()
"""Of methods that factorize nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InputHessian:
    """Second moments of one input, in diagonal blocks; most inputs have a single one.

    Attributes:
        slices: Columns of each block.
        hessians: Blocks of the Hessian that methods fit.
        drift: Means of d x^T with d the input's distance from the float model's; `None` where
            that is not followed.
        judge: Blocks of the Hessian that results are compared on.
        judge_drift: Means of d x^T and of d d^T on the same tokens.
        judged_on: Whose tokens those are.
        steps: Of the same tokens in int8.
        tokens: Calibration tokens that the Hessian is a mean over.
        feedback: How it is factorized.
        lookup_share: See `from_moments`.
    """

    slices: tuple[slice, ...]
    hessians: tuple[Tensor, ...]
    drift: tuple[Tensor, ...] | None
    judge: tuple[Tensor, ...]
    judge_drift: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None
    judged_on: str
    steps: Int8Steps
    tokens: int
    feedback: ErrorFeedback
    lookup_share: float = 0.0
    _factors: dict[int, tuple[Factor | None, ...]] = field(default_factory=dict, init=False)

    @classmethod
    def from_moments(
        cls,
        moments: InputMoments,
        feedback: ErrorFeedback = NO_FEEDBACK,
        *,
        lookup_share: float = 0.0,
    ) -> InputHessian:
        """The Hessian of an input, and the one that judges.

        Args:
            moments: The moments.
            feedback: How it will be factorized.
            lookup_share: For a weight whose rows are also looked up, as those of a tied head are:
                how much an error of a looked-up element counts beside one of an output, whose
                Hessian is scaled to a mean diagonal of one.

        Raises:
            CalibrationError: It holds values that are not finite, or no token was seen.
        """
        fitted, held_out = moments.calibration, moments.held_out
        blocks = _add_lookups(fitted.blocks(), lookup_share)
        if not all(bool(torch.isfinite(block).all()) for block in blocks):
            raise CalibrationError("the second moment of its inputs is not finite")
        judging = moments.held_out_drift if held_out else moments.drift
        return cls(
            slices=fitted.slices,
            hessians=blocks,
            drift=None if moments.drift is None else moments.drift.cross.blocks(),
            judge=_add_lookups(held_out.blocks(), lookup_share) if held_out else blocks,
            judge_drift=None if judging is None else _means(judging),
            judged_on="held-out tokens" if held_out else "calibration tokens",
            steps=(held_out or fitted).int8_steps(),
            tokens=fitted.tokens,
            feedback=feedback,
            lookup_share=lookup_share,
        )

    @property
    def device(self) -> torch.device:
        """Where it is, and where layers are compressed against it."""
        return self.hessians[0].device

    @property
    def importance(self) -> Tensor:
        """Diagonal of the Hessian: how much an error in each column counts, float64 [columns]."""
        return torch.cat([H.diagonal().to(torch.float64) for H in self.hessians])

    def factorize(self, group_size: int) -> tuple[Factor | None, ...]:
        """One factor per diagonal block for groups of some width, made once.

        A block that has no factor even with the strongest damping is `None`.
        """
        if group_size not in self._factors:
            damping, order = self.feedback.damping, self.feedback.order
            make = partial(factorize, group_size=group_size, damping=damping, order=order)
            self._factors[group_size] = tuple(map(make, self.hessians))
        return self._factors[group_size]

    def factors(self, group_size: int) -> tuple[Factor, ...]:
        """The factors of all blocks.

        Raises:
            ValueError: One has none; ask `factorize` first.
        """
        found = tuple(factor for factor in self.factorize(group_size) if factor is not None)
        if len(found) < len(self.slices):
            raise ValueError("a block of the Hessian could not be factorized")
        return found

    def targets(self, rows: Tensor, group_size: int) -> Tensor:
        """What rows of a weight should be rounded to, [rows, columns] in float64."""
        if self.drift is None or self.feedback.drift_share == 0:
            return rows
        aligned = rows.clone()
        for part, factor, cross in zip(
            self.slices, self.factors(group_size), self.drift, strict=True
        ):
            moved = align_to_float(rows[:, part], factor, cross)
            aligned[:, part] += self.feedback.drift_share * moved
        return aligned


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


def _add_lookups(blocks: tuple[Tensor, ...], share: float) -> tuple[Tensor, ...]:
    """Hessians of outputs and, beside them, of the rows themselves."""
    if share == 0:
        return blocks
    mean = float(torch.cat([block.diagonal() for block in blocks]).mean())
    return tuple(
        block + share * mean * torch.eye(len(block), dtype=block.dtype, device=block.device)
        for block in blocks
    )


def _means(drift: Drift) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return drift.cross.blocks(), drift.own.blocks()
