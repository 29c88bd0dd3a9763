"""LLM-Pruner's Taylor importance of units, from the answer's loss.

Ma et al., arXiv 2305.11627, section 3.2: what the loss changes when a weight w becomes zero is
|g w - w F w / 2| to second order, with the gradient g and the Fisher information F (the mean of
squared gradients) for the Hessian; a unit sums it over every weight that it owns, biases included,
since they go with it. Three of the paper's elements: `first` |g w|, `second` |w F w|, `mix` both.
Their code sums gradients over the batch, so that `mix` weighs its terms by the batch size, and
fails on attention; here g and F are means over samples, each of its own loss, and depend neither
on how many samples there are nor on how they are batched. Gradients are those of the whole model,
as published, even where a unit of a block after pruned ones is scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.gradients.layer_gradients import LayerGradient, walk_gradients
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.width.channels import UnitGroup
from pocketvlm.compress.pruning.width.compensation import InputStatistics
from pocketvlm.compress.pruning.width.unit_scores import UnitScorer, sum_units
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError

__all__ = ["GradientMeans", "Order", "Taylor", "taylor_elements"]

Order = Literal["first", "second", "mix"]
_ORDERS = ("first", "second", "mix")


def taylor_elements(
    weight: Tensor, gradient: Tensor, fisher: Tensor | None, order: Order
) -> Tensor:
    """How much the loss changes with each element, of the shape of `weight`.

    Args:
        weight: w.
        gradient: g, the mean of the samples' gradients.
        fisher: F, the mean of their squares; not read for `first`.
        order: Which terms are taken.

    Raises:
        ValueError: The order needs F.
    """
    if order == "first":
        return (weight * gradient).abs()
    if fisher is None:
        raise ValueError(f"order {order!r} needs the mean of squared gradients")
    if order == "second":
        return (weight * fisher * weight).abs()
    return (weight * gradient - 0.5 * weight * fisher * weight).abs()


class GradientMeans:
    """Means over samples of one linear's gradients and of their squares.

    Args:
        squares: Whether squares are wanted, which doubles memory and work.

    Attributes:
        samples: How many were added.
    """

    def __init__(self, *, squares: bool = True) -> None:
        self.samples = 0
        self._squares = squares
        self._sums: dict[str, Tensor] = {}

    def add(self, step: LayerGradient) -> None:
        """Adds every sample of a batch."""
        for inputs, outputs in zip(step.inputs, step.outputs, strict=True):
            own = {"weight": outputs.T @ inputs, "bias": outputs.sum(dim=0)}
            for name, gradient in own.items():
                self._accumulate(f"{name}.gradient", gradient)
                if self._squares:
                    self._accumulate(f"{name}.fisher", gradient.square())
            self.samples += 1

    def of(self, parameter: Literal["weight", "bias"]) -> tuple[Tensor, Tensor | None]:
        """Mean gradient of the weight or of the bias, and mean square where it is wanted."""
        second = self._sums[f"{parameter}.fisher"] / self.samples if self._squares else None
        return self._sums[f"{parameter}.gradient"] / self.samples, second

    def _accumulate(self, name: str, value: Tensor) -> None:
        if name in self._sums:
            self._sums[name] += value
        else:
            self._sums[name] = value.clone()


@dataclass(frozen=True, kw_only=True)
class Taylor:
    """First- or second-order change of the answer's loss, by one backward pass per sample.

    Attributes:
        order: `first`, `second` or `mix`.
    """

    takes_gradients: ClassVar[bool] = True

    kind: Literal["taylor"] = "taylor"
    order: Order = "first"

    def __post_init__(self) -> None:
        if self.order not in _ORDERS:
            raise ValueError(f"order {self.order!r} is unknown; allowed are {', '.join(_ORDERS)}")

    def begin(
        self,
        checkpoint: Checkpoint,
        groups: Sequence[UnitGroup],
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> UnitScorer:
        """Scores every unit on the model as it is.

        Raises:
            CalibrationError: A sample has no answer, or a loss or gradient is not finite.
        """
        owners = {name: group for group in groups for name in group.linears}
        means: dict[str, GradientMeans] = {}
        scores: dict[str, Tensor] = {}
        done = 0
        for step in walk_gradients(checkpoint, calibration, spill_folder=ctx.scratch_dir):
            group = owners.get(step.name)
            if group is None:
                continue
            if step.name not in means:
                means[step.name] = GradientMeans(squares=self.order != "first")
            means[step.name].add(step)
            if not step.is_last:
                continue
            mine = self._linear(group, step.name, checkpoint, means.pop(step.name))
            scores[group.name] = scores.get(group.name, 0.0) + mine
            done += 1
            ctx.report("taylor", done, len(owners), step.name)
        return _TaylorScorer(scores)

    def _linear(
        self, group: UnitGroup, name: str, checkpoint: Checkpoint, means: GradientMeans
    ) -> Tensor:
        """What a linear adds to the scores of its units, float64 [count]."""
        layer = checkpoint.layer(name)
        elements = taylor_elements(layer.weight, *means.of("weight"), self.order)
        total = sum_units(group, name, elements)
        bias = getattr(layer, "bias", None)
        # The bias of the linear that reads the units is not theirs.
        if bias is not None and name != group.last:
            elements = taylor_elements(bias.detach(), *means.of("bias"), self.order)
            total = total + sum_units(group, name, elements)
        return total


class _TaylorScorer:
    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        self._scores = scores

    def score(self, group: UnitGroup, checkpoint: Checkpoint, inputs: InputStatistics) -> Tensor:
        scores = self._scores[group.name]
        if not bool(torch.isfinite(scores).all()):
            raise CalibrationError("its Taylor importance is not finite")
        return scores
