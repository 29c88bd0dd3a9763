"""GBLM-Pruner: Wanda's score and, beside it, how much a weight's own gradient says it matters.

After Das et al., "Beyond Size" (arXiv 2311.04902): S = |W| ||X|| + alpha |W| ||G||, where G are
the gradients of single samples, whose signs are dropped before they are averaged. What differs
from the published code, and why:

- Norms are means, over tokens for X and over samples for G, in float32. The published sums make
  alpha grow with the number of samples (l1) or its root (l2), and X with the length of a sequence;
  sums in float16 stop growing.
- alpha is a pure number. The two terms have different units, so a published alpha belongs to one
  loss, one model and even one layer. Here each layer's gradients are scaled so that at alpha = 1
  both terms have the same mean over the layer: a factor on the loss, or one that moves from a
  layer's outputs into the weights after it, changes no mask.
- The loss is that of the answer to a question about a picture, carried through projector and
  tower, instead of that of every token of a text.
- `shrink` takes off what is noise of a norm of few samples (`gradient_norms.shrink_scatter`).
- `gradient: block` takes the gradient of the length of each block's own output instead, as
  Wanda++ does (arXiv 2503.04992): one forward walk, no answers needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.gradients.layer_gradients import block_gradients, walk_gradients
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.hessian import InputHessian
from pocketvlm.compress.pruning.unstructured.gradient_norms import GradientNorm, GradientNorms
from pocketvlm.compress.pruning.unstructured.score import (
    LayerPruner,
    Pruned,
    PruningScore,
    PruningTask,
    prune_by_score,
)
from pocketvlm.compress.pruning.unstructured.wanda import score_wanda
from pocketvlm.context import RunContext
from pocketvlm.weights.form import WeightForm

__all__ = ["Gblm", "Loss", "gradient_scale", "score_gblm"]

Loss = Literal["answer", "block"]
"""Whose gradient: that of the answer's loss, or that of the length of a block's output."""


def gradient_scale(weights: Tensor, mean_squares: Tensor, norms: Tensor) -> float:
    """What brings a layer's second term to the mean of its first.

    Args:
        weights: [rows, columns].
        mean_squares: E[x_j^2] over calibration tokens, [columns].
        norms: ||G_ij|| over calibration samples, [rows, columns].

    Returns:
        sum |W| ||X|| / sum |W| ||G||, in units of the layer's outputs per unit of loss; zero where
        no weight that is not zero has a gradient.
    """
    sizes = weights.abs().to(torch.float64)
    first = float(sizes.sum(dim=0) @ mean_squares.to(torch.float64).sqrt())
    second = float(torch.dot(sizes.flatten(), norms.to(torch.float64).flatten()))
    return first / second if second > 0 else 0.0


def score_gblm(weights: Tensor, mean_squares: Tensor, norms: Tensor, alpha: float) -> Tensor:
    """|W_ij| (sqrt(E[x_j^2]) + alpha s ||G_ij||) with s of `gradient_scale`, float64.

    At alpha = 0 it is Wanda's score to the last bit.

    Args:
        weights: [rows, columns].
        mean_squares: E[x_j^2] over calibration tokens, [columns].
        norms: ||G_ij|| over calibration samples, [rows, columns].
        alpha: Weight of the second term, whose mean over the layer is alpha times the first's.
    """
    scale = alpha * gradient_scale(weights, mean_squares, norms) if alpha else 0.0
    importance = torch.add(mean_squares.to(torch.float64).sqrt(), norms, alpha=scale)
    return weights.abs().to(torch.float64).mul_(importance)


@dataclass(frozen=True, kw_only=True)
class Gblm(PruningScore):
    """Keeps what moves outputs and the loss most (arXiv 2311.04902).

    Gradients are those of the dense model, as published; inputs are those after the layers that
    were pruned already.

    Attributes:
        gradient: Whose gradient. `answer` needs calibration samples with answers.
        norm: How single samples' gradients become one number per weight.
        alpha: Weight of gradients beside inputs; 0 is Wanda, and takes no gradients.
        shrink: Whether norms lose the part of their scatter within a layer that is noise of few
            samples.
    """

    kind: Literal["gblm"] = "gblm"
    gradient: Loss = "answer"
    norm: GradientNorm = "l1"
    alpha: float = 1.0
    shrink: bool = False

    def __post_init__(self) -> None:
        for field, allowed in (("gradient", Loss), ("norm", GradientNorm)):
            if getattr(self, field) not in get_args(allowed):
                raise ValueError(
                    f"{field} {getattr(self, field)!r} is unknown; allowed are "
                    f"{', '.join(get_args(allowed))}"
                )
        if not math.isfinite(self.alpha) or self.alpha < 0:
            raise ValueError(f"alpha must be at least 0 and finite, not {self.alpha}")

    @property
    def takes_gradients(self) -> bool:
        """Whether they have a part in the score."""
        return self.alpha > 0

    def begin(
        self,
        checkpoint: Checkpoint,
        tasks: Sequence[PruningTask],
        calibration: CalibrationSet,
        held_out: float,
        ctx: RunContext,
    ) -> LayerPruner:
        """Takes the gradients of the samples that are fitted, unless an earlier run has them.

        Raises:
            CalibrationError: A sample has no answer, a loss or a gradient is not finite, or a layer
                has no gradient at all.
        """
        if not self.takes_gradients:
            return self
        scratch = ctx.scratch_dir
        found = GradientNorms(None if scratch is None else scratch / "gradients")
        names = [task.linear.name for task in tasks]
        if ctx.ranks.first(found.holds(names)):
            found.share(names, ctx.ranks)
        else:
            judged = BlockWalk(
                checkpoint=checkpoint, samples=calibration, held_out=held_out
            ).first_held_out
            own = ctx.ranks.own(calibration.samples[:judged])
            samples = replace(calibration, samples=tuple(own))
            walk = walk_gradients if self.gradient == "answer" else block_gradients
            done: list[str] = []

            def report(name: str) -> None:
                done.append(name)
                ctx.report("gradients", len(done), len(names), name)

            steps = walk(checkpoint, samples, spill_folder=scratch, ranks=ctx.ranks)
            found.collect(steps, names, self.norm, report, shrink=self.shrink, ranks=ctx.ranks)
        return _MeasuredGblm(alpha=self.alpha, norms=found)

    def prune(self, task: PruningTask, weight: WeightForm, hessian: InputHessian | None) -> Pruned:
        """Keeps what scores highest without gradients: `alpha` is 0."""
        if hessian is None:
            raise TypeError("GBLM needs its layers' inputs")
        scores = score_wanda(weight.dequantize(), hessian.importance)
        return prune_by_score(task, weight, scores, {"gradient_scale": 0.0})


@dataclass(frozen=True, kw_only=True, eq=False)
class _MeasuredGblm(LayerPruner):
    alpha: float
    norms: GradientNorms

    def prune(self, task: PruningTask, weight: WeightForm, hessian: InputHessian | None) -> Pruned:
        if hessian is None:
            raise TypeError("GBLM needs its layers' inputs")
        weights, squares = weight.dequantize(), hessian.importance
        norms, signal = self.norms.read(task.linear.name)
        scores = score_gblm(weights, squares, norms, self.alpha)
        scale = gradient_scale(weights, squares, norms)
        figures = {"gradient_scale": scale, "gradient_signal": signal}
        return prune_by_score(task, weight, scores, figures)
