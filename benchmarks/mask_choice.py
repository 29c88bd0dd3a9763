"""How SparseGPT's masks are best chosen: over which elements, and how many columns at a time.

    python benchmarks/mask_choice.py --model pocket-llava --ratio 0.5 0.7

Every linear of tower, projector and decoder is pruned by itself, on the float model's inputs, and
judged by the squared change of its outputs on held-out samples, relative to the outputs' squares.
`published` takes the same share from every group of 128 columns, over all rows; `rows` and `layer`
are this package's. Printed is the geometric mean over layers, and in how many of them a choice
loses less than the published one. Calibration pictures alone are used. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.walk.steps import LinearGroup
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.error_feedback import Factor, quantize_with_feedback
from pocketvlm.compress.layerwise.hessian import (
    ErrorFeedback,
    InputHessian,
    diagonal_block_width,
)
from pocketvlm.compress.layerwise.output_loss import compare_outputs
from pocketvlm.compress.pruning.unstructured.masked_rounding import MaskedRounding
from pocketvlm.compress.pruning.unstructured.patterns import Unstructured, select
from pocketvlm.compress.pruning.unstructured.rules import DEFAULT_RULES, choose_layers
from pocketvlm.compress.pruning.unstructured.sparsegpt import prune_with_feedback
from pocketvlm.compress.pruning.unstructured.wanda import score_wanda
from pocketvlm.reference import REFERENCE_MODELS, reference_model_path
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm

PATTERN = Unstructured()
PUBLISHED = 128
WIDTHS = (8, 32, 128)


def published(
    dense: Tensor, hessian: InputHessian, factors: Sequence[Factor], ratio: float
) -> Tensor:
    """The paper's masks: the same share of every group, over all rows."""
    values = torch.empty_like(dense)
    for part, factor in zip(hessian.slices, factors, strict=True):
        widths = [end - start for start, end in pairwise(factor.order.borders)]
        counts = [torch.tensor([round((1 - ratio) * len(dense) * width)]) for width in widths]
        alive = hessian.importance[part] > 0
        rounding = MaskedRounding(factor, alive, PATTERN, "layer", PUBLISHED, counts)
        values[:, part] = quantize_with_feedback(dense[:, part], factor, rounding).T
    return values


def losses_of(form: WeightForm, hessian: InputHessian, ratio: float) -> dict[str, float]:
    """Relative loss of one layer's outputs by every choice."""
    dense = form.dequantize().to(torch.float64)
    kept = round((1 - ratio) * dense.numel())
    made = {
        "magnitude": dense * select(dense.abs(), PATTERN, kept),
        "Wanda": dense * select(score_wanda(dense, hessian.importance), PATTERN, kept),
    }
    for width in WIDTHS:
        factors = [factor for factor in hessian.factorize(width) if factor is not None]
        if width == PUBLISHED:
            made["published, 128"] = published(dense, hessian, factors, ratio)
        for compare in ("rows", "layer"):
            _, values = prune_with_feedback(
                dense, hessian, factors, PATTERN, kept, compare=compare, width=width
            )
            made[f"{compare}, {width}"] = values
    found = {}
    for label, values in made.items():
        pruned = DenseWeight(values=values.to(torch.float32))
        losses = compare_outputs(form, pruned, pruned, hessian)
        found[label] = losses.fitted / losses.output
    return found


def measure(model: str, samples: int, ratios: Sequence[float]) -> list[dict[str, Any]]:
    """One row per layer and ratio."""
    checkpoint = Checkpoint.load(reference_model_path(model))
    linears = checkpoint.spec.linears()
    wanted = {t.linear.name for t in choose_layers(DEFAULT_RULES, PATTERN, linears) if not t.reason}
    walk = BlockWalk(
        checkpoint=checkpoint, samples=CalibrationSet.from_reference(0, samples), held_out=0.25
    )
    rows: list[dict[str, Any]] = []
    for step in walk:
        if not isinstance(step, LinearGroup) or step.moments is None:
            continue
        names = [name for name in step.names if name in wanted]
        if not names:
            continue
        width = checkpoint.form(names[0]).shape[1]
        moments = step.moments(diagonal_block_width(width, WIDTHS))
        hessian = InputHessian.from_moments(moments, ErrorFeedback(damping=0.01))
        for name in names:
            rows += [
                {"layer": name, "ratio": ratio} | losses_of(checkpoint.form(name), hessian, ratio)
                for ratio in ratios
            ]
    return rows


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=REFERENCE_MODELS, default=next(iter(REFERENCE_MODELS)))
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = measure(arguments.model, arguments.samples, arguments.ratio)
    labels = [label for label in rows[0] if label not in ("layer", "ratio")]
    print(f"{'ratio':>5} {'choice':<16}{'mean loss':>11}{'better than published in':>26}")
    for ratio in arguments.ratio:
        own = [row for row in rows if row["ratio"] == ratio]
        for label in labels:
            mean = math.exp(sum(math.log(float(row[label])) for row in own) / len(own))
            better = sum(float(row[label]) < float(row["published, 128"]) for row in own)
            print(f"{ratio:>5} {label:<16}{mean:>11.5f}{better:>20} of {len(own)}")
    print(json.dumps({"arguments": vars(arguments), "layers": rows}))


if __name__ == "__main__":
    main()
