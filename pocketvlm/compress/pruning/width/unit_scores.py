"""What every importance of units has in common, and the baseline: the size of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.width.channels import UnitGroup
from pocketvlm.compress.pruning.width.compensation import InputStatistics
from pocketvlm.context import RunContext

__all__ = ["UnitImportance", "UnitMagnitude", "UnitScorer", "group_magnitude", "sum_units"]


class UnitScorer(Protocol):
    """Scores of one run; made for each run, so it may remember."""

    def score(self, group: UnitGroup, checkpoint: Checkpoint, inputs: InputStatistics) -> Tensor:
        """How much the model would miss each unit.

        Args:
            group: The units of one sublayer.
            checkpoint: The model as it is now: whole here, pruned before.
            inputs: What the group's last linear reads, centred.

        Returns:
            float64 [count], not negative.
        """


class UnitImportance(Protocol):
    """A way to score units: a frozen dataclass that is its own configuration.

    Attributes:
        takes_gradients: Whether it takes gradients of the whole model.
    """

    takes_gradients: ClassVar[bool]

    @property
    def kind(self) -> str:
        """The tag that names it in a recipe."""

    def begin(
        self,
        checkpoint: Checkpoint,
        groups: Sequence[UnitGroup],
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> UnitScorer:
        """Whatever has to be known of the whole model before a unit is removed."""


@dataclass(frozen=True, kw_only=True)
class UnitMagnitude:
    """The sum of squares of all weights that a unit owns; no data."""

    takes_gradients: ClassVar[bool] = False

    kind: Literal["magnitude"] = "magnitude"

    def begin(
        self,
        checkpoint: Checkpoint,
        groups: Sequence[UnitGroup],
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> UnitScorer:
        """Nothing has to be known."""
        return _MagnitudeScorer()


class _MagnitudeScorer:
    def score(self, group: UnitGroup, checkpoint: Checkpoint, inputs: InputStatistics) -> Tensor:
        return group_magnitude(group, checkpoint)


def group_magnitude(group: UnitGroup, checkpoint: Checkpoint) -> Tensor:
    """Sum of squares of the weights of each unit, float64 [count]."""
    total = torch.zeros(group.count, dtype=torch.float64)
    for name in group.linears:
        total += sum_units(group, name, checkpoint.form(name).dequantize().double().square())
    return total


def sum_units(group: UnitGroup, name: str, elements: Tensor) -> Tensor:
    """Sums values of a linear's elements over what each unit owns of it.

    Args:
        group: The units.
        name: One of the group's linears.
        elements: [rows, columns], or [rows] for those of a bias.

    Returns:
        float64 [count].
    """
    if name == group.last:
        by_column = elements.sum(dim=0, dtype=torch.float64)
        return by_column.view(group.count, group.columns).sum(dim=1)
    by_row = elements.flatten(1).sum(dim=1, dtype=torch.float64) if elements.ndim > 1 else elements
    return by_row.to(torch.float64).view(group.count, group.rows[name]).sum(dim=1)
