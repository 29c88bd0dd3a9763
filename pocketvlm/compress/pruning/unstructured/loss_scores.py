"""How fast the answers' loss changes with each layer's weights: ECoFLaP's two global scores.

Zeroth order (`GradOnly` in the code of arXiv 2310.02998): with noise z ~ N(0, 1) and a step e,
|L(W + e z) - L(W - e z)| / 2e, from forward passes alone. First order (`GradMagAbs`): the sum over
all elements of |W| mean |g|, from the gradients g of single samples.

What is different here, and why:

- The noise lies in a form that is put in the weight's place, and the weight itself is put back:
  its bits stay as they were, where adding and subtracting noise leaves rounding behind.
- |.| is taken of each sample's difference and then averaged; the published code takes that of a
  batch of 8. Gradients of samples are all but orthogonal, so that one draw of noise gives as many
  nearly independent looks at the length of a gradient as there are samples.
- The step is a share of the weight's own root mean square, and so is the unit of the score: a
  layer whose weights are twice as large, after a norm of half the gain, is the same function and
  gets the same score. Published is an absolute 1e-3.
- Noise belongs to the seed and the layer's name, not to a global generator and an order.
- Only what comes after a layer is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.gradients.answer_losses import AnswerLosses
from pocketvlm.calibration.gradients.layer_gradients import LayerGradient, walk_gradients
from pocketvlm.calibration.walk.activations import float64_device
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.scratch import find_document, keep_document
from pocketvlm.context import RunContext, derive_seed
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm

__all__ = ["first_order_scores", "first_order_sum", "zeroth_order_score", "zeroth_order_scores"]

_TASK = "ecoflap"
_SCORES = "ecoflap.json"


def zeroth_order_score(
    losses_with: Callable[[WeightForm], Tensor],
    weight: WeightForm,
    *,
    noise: float,
    generators: Sequence[torch.Generator],
) -> float:
    """Mean over draws and samples of |L(W + e z) - L(W - e z)| / (2 noise), e = noise * rms(W).

    To first order its expectation is sqrt(2 / pi) rms(W) times the mean length of the samples'
    gradients. 0 for a weight that is all zero: nothing is lost with it.

    Args:
        losses_with: Every sample's loss [samples] with another form in the weight's place.
        weight: The weight, [rows, columns].
        noise: Length of the step, as a share of the weight's root mean square.
        generators: One per draw.
    """
    dense = weight.dequantize()
    scale = float(dense.square().mean(dtype=torch.float64).sqrt())
    if scale == 0:
        return 0.0
    found = 0.0
    for generator in generators:
        step = torch.randn(dense.shape, generator=generator) * (noise * scale)
        ahead = losses_with(DenseWeight(values=dense + step))
        behind = losses_with(DenseWeight(values=dense - step))
        found += float((ahead - behind).abs().mean()) / (2 * noise)
    return found / len(generators)


def first_order_sum(weight: Tensor, step: LayerGradient) -> float:
    """Sum over a batch's samples and all elements of |W| |g|, in float64."""
    magnitude, place = weight.abs(), float64_device(weight.device)
    return sum(
        float((magnitude * (outputs.T @ inputs).abs()).to(place).sum(dtype=torch.float64))
        for inputs, outputs in zip(step.inputs, step.outputs, strict=True)
    )


def zeroth_order_scores(
    checkpoint: Checkpoint,
    names: Collection[str],
    samples: CalibrationSet,
    ctx: RunContext,
    *,
    noise: float,
    draws: int,
) -> dict[str, float]:
    """The zeroth-order score of every layer; an interrupted run resumes after its last one.

    Args:
        checkpoint: The model; every weight is left as it was, bit by bit.
        names: Layers that are scored.
        samples: Pictures with questions and answers.
        ctx: Told of every forward pass.
        noise: Length of the step, as a share of the weight's root mean square.
        draws: Draws of noise per layer.

    Raises:
        CalibrationError: A sample has no image or no answer, or a loss is not finite.
    """
    scores = _read(ctx)
    if scores.keys() >= set(names):
        return {name: scores[name] for name in names}
    losses = AnswerLosses(checkpoint, samples)
    forwards = 2 * draws * len(names)
    done = 2 * draws * sum(name in scores for name in names)
    for linear in checkpoint.spec.linears():  # in order of execution
        name = linear.name
        if name not in names or name in scores:
            continue

        def losses_with(form: WeightForm, name: str = name) -> Tensor:
            nonlocal done
            found = losses.with_form(name, form)
            done += 1
            ctx.report(_TASK, done, forwards, name)
            return found

        labels = [f"{name} {draw}" for draw in range(draws)]
        scores[name] = zeroth_order_score(
            losses_with,
            checkpoint.form(name),
            noise=noise,
            generators=[
                torch.Generator().manual_seed(derive_seed(ctx.seed, label)) for label in labels
            ],
        )
        _write(ctx, scores)
    return {name: scores[name] for name in names}


def first_order_scores(
    checkpoint: Checkpoint, names: Collection[str], samples: CalibrationSet, ctx: RunContext
) -> dict[str, float]:
    """The first-order score of every layer.

    Args:
        checkpoint: The model.
        names: Layers that are scored.
        samples: Pictures with questions and answers.
        ctx: Told of every finished layer.

    Raises:
        CalibrationError: A sample has no image or no answer, or a loss or gradient is not finite.
    """
    scores = _read(ctx)
    if scores.keys() >= set(names):
        return {name: scores[name] for name in names}
    sums = dict.fromkeys(names, 0.0)
    done = 0
    own = replace(samples, samples=tuple(ctx.ranks.own(samples.samples)))
    for step in walk_gradients(checkpoint, own, spill_folder=ctx.scratch_dir, ranks=ctx.ranks):
        if step.name not in sums:
            continue
        weight = checkpoint.form(step.name).dequantize().to(checkpoint.device)
        sums[step.name] += first_order_sum(weight, step)
        if step.is_last:
            done += 1
            ctx.report(_TASK, done, len(sums), step.name)
    totals = np.array(list(sums.values()))
    ctx.ranks.add_up(totals)
    scores = {name: float(total) / len(samples) for name, total in zip(sums, totals, strict=True)}
    _write(ctx, scores)
    return scores


def _read(ctx: RunContext) -> dict[str, float]:
    """What a run before this one scored; a scratch folder belongs to one stage of one run."""
    found = None if ctx.scratch_dir is None else find_document(ctx.scratch_dir / _SCORES)
    scores: dict[str, float] = ctx.ranks.first({} if found is None else found["scores"])
    return dict(scores)


def _write(ctx: RunContext, scores: dict[str, float]) -> None:
    if ctx.scratch_dir is not None:
        keep_document(ctx.scratch_dir / _SCORES, {"scores": scores})
