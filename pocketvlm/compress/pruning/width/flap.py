"""FLAP's fluctuation: a unit that hardly varies is one that a constant can replace.

An et al., arXiv 2312.11983, equation 5 (WIFV): S_j = Var_t(x_j) * sum_i W_ij^2 over the inputs j of
`o`, `down` and `fc2`: what leaves the output's variance when input j becomes its mean, as if inputs
were independent. A KV group sums its channels. Different from the authors' code: every block loses
equally many units, so that scores need no standardization across layers; those of attention are not
squared before they are summed, since that has no meaning in units of output; inputs are those of
the model as pruned so far, which the compensation is fitted to as well; query heads that share a
key-value head, which their code does not know, go together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.width.channels import UnitGroup
from pocketvlm.compress.pruning.width.compensation import InputStatistics
from pocketvlm.compress.pruning.width.unit_scores import UnitScorer
from pocketvlm.context import RunContext

__all__ = ["Flap", "fluctuation"]


def fluctuation(weight: Tensor, variance: Tensor) -> Tensor:
    """Var(x_j) * sum_i W_ij^2, float64 [columns].

    Args:
        weight: W, float64 [rows, columns].
        variance: Of the inputs, float64 [columns].
    """
    return variance * weight.square().sum(dim=0)


@dataclass(frozen=True, kw_only=True)
class Flap:
    """Fluctuation of the units' outputs, by forward passes alone."""

    takes_gradients: ClassVar[bool] = False

    kind: Literal["flap"] = "flap"

    def begin(
        self,
        checkpoint: Checkpoint,
        groups: Sequence[UnitGroup],
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> UnitScorer:
        """Nothing has to be known: inputs come with the walk."""
        return _FlapScorer()


class _FlapScorer:
    def score(self, group: UnitGroup, checkpoint: Checkpoint, inputs: InputStatistics) -> Tensor:
        weight = checkpoint.form(group.last).dequantize().double()
        channels = fluctuation(weight, inputs.variance)
        return channels.view(group.count, group.columns).sum(dim=1)
