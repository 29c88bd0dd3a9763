"""What a walk over a model hands out: inputs with their statistics, and finished sublayers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pocketvlm.calibration.data.prompts import PromptBatch
from pocketvlm.calibration.walk.activations import ActivationStore
from pocketvlm.calibration.walk.moments import CrossMoment, SecondMoment
from pocketvlm.reference_graph.sublayers import Sublayer, SublayerRows

__all__ = [
    "Drift",
    "FinishedSublayer",
    "InputMoments",
    "LinearGroup",
    "Step",
    "TokenWeights",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Drift:
    """How far an input has moved from the float model's: d_t = x_t(float) - x_t(now).

    Attributes:
        cross: Mean of d x^T.
        own: Mean of d d^T.
    """

    cross: CrossMoment
    own: SecondMoment


@dataclass(frozen=True, kw_only=True, eq=False)
class InputMoments:
    """Statistics of one input.

    Attributes:
        calibration: Over the samples that a method may fit.
        held_out: Over the samples that only judge it; `None` where all samples are fitted.
        drift: Of the former, where the walk carries the float path along.
        held_out_drift: Of the latter, likewise.
    """

    calibration: SecondMoment
    held_out: SecondMoment | None
    drift: Drift | None = None
    held_out_drift: Drift | None = None

    def to(self, device: torch.device) -> InputMoments:
        """The same statistics on a device, which are moved there."""
        for drift in (self.drift, self.held_out_drift):
            if drift is not None:
                drift.cross.move(device)
                drift.own.move(device)
        self.calibration.move(device)
        if self.held_out is not None:
            self.held_out.move(device)
        return self


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearGroup:
    """One step of the walk.

    Attributes:
        names: Linears that read this input, in order of execution.
        moments: Computes the input's statistics from the model as it is now; its argument is the
            width of diagonal blocks, for inputs too wide for a full matrix. `None` for a table
            that is only looked up.
    """

    names: tuple[str, ...]
    moments: Callable[[int | None], InputMoments] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedSublayer:
    """A sublayer whose layers have all been visited; what it holds may still be tuned.

    Attributes:
        sublayer: The sublayer.
        inputs: Hidden states before it as they are now, batch by batch.
        targets: Hidden states after it in the float model.
        rows: What its body takes beside the hidden state, batch by batch; empty in a tower that has
            merged no tokens.
        batches: Which samples a batch holds; `None` for batches outside of all moments.
        weights_of: Weights of a batch's tokens, or `None` for all alike.
    """

    sublayer: Sublayer
    inputs: ActivationStore
    targets: ActivationStore
    rows: Sequence[SublayerRows]
    batches: Sequence[PromptBatch | None]
    weights_of: Callable[[int], Tensor | None]

    @property
    def names(self) -> tuple[str, ...]:
        """Its linears in order of execution."""
        return (*self.sublayer.first, self.sublayer.last)

    def rows_of(self, index: int) -> SublayerRows | None:
        """What the body takes beside the hidden state of a batch."""
        return self.rows[index] if self.rows else None


Step = LinearGroup | FinishedSublayer
TokenWeights = Callable[[Literal["first", "last"], int], Tensor | None]
"""Weights of a batch's tokens at the linears that start or end a sublayer."""
