"""What ECoFLaP's scores are worth: their noise, their agreement, and which groups to share out to.

    python benchmarks/ecoflap_scores.py noise --every 3
    python benchmarks/ecoflap_scores.py groups --ratio 0.6 0.7

`noise` compares finite differences with the exact directional derivatives <g, z> of every sample,
scores of two draws with each other, and both orders. |.| is taken of means over 1, 8 or all
samples; the published code has 8. `groups` prunes by Wanda with each grouping and prints the mean
loss of answers to other calibration scenes. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import spearmanr
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.gradients.answer_losses import AnswerLosses
from pocketvlm.calibration.gradients.layer_gradients import walk_gradients
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.unstructured.allocation import Uniform
from pocketvlm.compress.pruning.unstructured.ecoflap import Ecoflap
from pocketvlm.compress.pruning.unstructured.pruner import Prune
from pocketvlm.compress.pruning.unstructured.wanda import Wanda
from pocketvlm.context import RunContext, derive_seed
from pocketvlm.reference import reference_model_path
from pocketvlm.weights.dense import DenseWeight

STEPS = (1e-1, 1e-2, 1e-3)
_MIDDLE = 1e-2


def noise_of(name: str, draw: int, like: Tensor) -> Tensor:
    """The same noise as the stage's."""
    generator = torch.Generator().manual_seed(derive_seed(0, f"{name} {draw}"))
    return torch.randn(like.shape, generator=generator)


def differences(
    checkpoint: Checkpoint, names: Sequence[str], samples: CalibrationSet
) -> dict[tuple[float, int], list[Tensor]]:
    """(L(W + e z) - L(W - e z)) / 2 noise of every layer and sample, by step and draw."""
    losses = AnswerLosses(checkpoint, samples)
    found: dict[tuple[float, int], list[Tensor]] = {}
    for name in names:
        dense = checkpoint.form(name).dequantize()
        scale = float(dense.double().square().mean().sqrt())
        for step, draw in ((_MIDDLE, 1), *((step, 0) for step in STEPS)):
            move = noise_of(name, draw, dense) * (step * scale)
            ahead = losses.with_form(name, DenseWeight(values=dense + move))
            behind = losses.with_form(name, DenseWeight(values=dense - move))
            found.setdefault((step, draw), []).append((ahead - behind) / (2 * step))
    return found


def exact(
    checkpoint: Checkpoint, names: Sequence[str], samples: CalibrationSet
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """<g, z> rms(W) of every sample for the first draw, and the first-order score, by layer."""
    slopes = {name: torch.zeros(len(samples), dtype=torch.float64) for name in names}
    first = dict.fromkeys(names, 0.0)
    for part in walk_gradients(checkpoint, samples):
        if part.name not in slopes:
            continue
        dense = checkpoint.form(part.name).dequantize()
        move = noise_of(part.name, 0, dense) * dense.double().square().mean().sqrt()
        for sample, inputs, outputs in zip(part.samples, part.inputs, part.outputs, strict=True):
            gradient = outputs.T @ inputs
            slopes[part.name][sample] = (gradient.double() * move).sum()
            first[part.name] += float((dense * gradient).abs().sum(dtype=torch.float64))
    return slopes, first


def compare(one: ArrayLike, two: ArrayLike) -> tuple[float, float]:
    """Standard deviation of the logarithm of the ratio, and rank correlation."""
    return float(np.std(np.log(np.divide(one, two)))), float(spearmanr(one, two)[0])


def measure_sets(
    checkpoint: Checkpoint, names: Sequence[str], first: Mapping[str, float], other: CalibrationSet
) -> dict[str, float]:
    """How far first-order scores of another calibration set differ."""
    again = exact(checkpoint, names, other)[1]
    spread, ranks = compare([first[name] for name in names], [again[name] for name in names])
    print(f"two calibration sets: spread {spread:.3f}, rank correlation {ranks:.3f}")
    return {"spread": spread, "rank_correlation": ranks}


def measure_noise(
    checkpoint: Checkpoint, samples: CalibrationSet, other: CalibrationSet, every: int
) -> dict[str, Any]:
    """How far scores can be trusted."""
    parts = ("tower", "projector", "decoder")
    names = [item.name for item in checkpoint.spec.linears() if item.part in parts][1::every]
    raw = differences(checkpoint, names, samples)
    slopes, first = exact(checkpoint, names, samples)
    errors = {
        f"{step:g}": float(
            np.median(
                [
                    float((found - slopes[name]).norm() / slopes[name].norm())
                    for name, found in zip(names, raw[step, 0], strict=True)
                ]
            )
        )
        for step in STEPS
    }
    reference = [first[name] for name in names]
    by_mean = {}
    for count in (1, 8, len(samples)):
        one, two = (
            np.array(
                [float(row.view(-1, count).mean(dim=1).abs().mean()) for row in raw[_MIDDLE, d]]
            )
            for d in (0, 1)
        )
        spread, ranks = compare(one, two)
        by_mean[count] = {
            "spread_between_draws": spread,
            "rank_correlation_of_draws": ranks,
            "rank_correlation_with_first_order": compare(one, reference)[1],
        }
    print(f"{len(names)} layers, {len(samples)} samples")
    for step, error in errors.items():
        print(f"step {step:>6} rms: median relative error of differences {error:.4f}")
    for count, row in by_mean.items():
        print(f"|mean of {count:>2}|:", ", ".join(f"{key} {row[key]:.3f}" for key in row))
    sets = measure_sets(checkpoint, names, first, other)
    return {"errors": errors, "by_mean": by_mean, "sets": sets}


def measure_groups(
    model: str, samples: CalibrationSet, judges: CalibrationSet, ratios: Sequence[float], order: Any
) -> list[Mapping[str, Any]]:
    """The loss of answers after Wanda with each grouping."""
    rows: list[Mapping[str, Any]] = []
    kinds = {"uniform": Uniform()} | {
        group: Ecoflap(order=order, group=group, samples=len(samples))
        for group in ("block", "layer", "part")
    }
    for ratio in ratios:
        for label, allocation in kinds.items():
            stage = Prune(score=Wanda(), ratio=ratio, allocation=allocation)
            path = reference_model_path(model)
            done = stage.apply(Checkpoint.load(path), samples, RunContext())
            loss = float(AnswerLosses(done, judges).plain.mean())
            rows.append({"ratio": ratio, "group": label, "loss": loss})
            print(f"{ratio:.0%} {label:<8} loss {loss:.3f}", flush=True)
    return rows


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("noise", "groups"))
    parser.add_argument("--model", default="pocket-llava")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calibration-seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="Only every so-manieth layer.")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.6, 0.7])
    parser.add_argument("--order", choices=("zeroth", "first"), default="first")
    parser.add_argument("--judges", type=int, default=96)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seed = arguments.calibration_seed
    samples = CalibrationSet.from_reference(seed, arguments.samples)
    found: Any
    if arguments.what == "noise":
        checkpoint = Checkpoint.load(reference_model_path(arguments.model))
        other = CalibrationSet.from_reference(seed + 1, arguments.samples)
        found = measure_noise(checkpoint, samples, other, arguments.every)
    else:
        judges = CalibrationSet.from_reference(900 + seed, arguments.judges)
        found = measure_groups(arguments.model, samples, judges, arguments.ratio, arguments.order)
    print(json.dumps({**vars(arguments), "found": found}))


if __name__ == "__main__":
    main()
