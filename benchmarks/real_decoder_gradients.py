"""How much of GBLM's gradients is noise, at few samples, and what that does to masks.

    PYTHONPATH=.:DIR python benchmarks/real_decoder_gradients.py --work WORK --samples 8 --every 3

DIR and WORK are those of `real_decoder.py`, which makes the model. Gradients are taken of two
halves of one calibration set. Their norms are compared as a mask compares them, within a row: by
the correlation of their logarithms once each row and each column has lost its own mean, which for
more samples follows Spearman and Brown. Then masks are: how many of the removed weights one half
removes and the other keeps, and how many both together remove and Wanda keeps. Medians over layers;
the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from real_decoder_text import calibration_set
from torch import Tensor
from transformers import AutoTokenizer

from pocketvlm.calibration.gradients.layer_gradients import LayerGradient, walk_gradients
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.unstructured.gblm import score_gblm
from pocketvlm.compress.pruning.unstructured.patterns import Unstructured, select
from pocketvlm.compress.pruning.unstructured.wanda import score_wanda
from pocketvlm.processor.foreign_code import STOCK_ONLY

ALPHAS = (0.1, 0.3, 1.0)
SAMPLES = (7, 28, 128)
_SMALLEST = 1e-6  # of a layer's mean norm


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer.

    Attributes:
        name: The layer.
        correlation: Of the norms of both halves.
        unsteady: Share of the removed weights that one half alone removes, by alpha.
        moved: Share of the removed weights that Wanda keeps, by alpha.
    """

    name: str
    correlation: float
    unsteady: dict[float, float]
    moved: dict[float, float]


class HalfNorms:
    """One layer's norms over either half of the samples, and its inputs' mean squares.

    Args:
        half: Samples of the first half.
    """

    def __init__(self, half: int) -> None:
        self._half = half
        self._sums: list[Tensor | float] = [0.0, 0.0]
        self._squares: Tensor | float = 0.0
        self._tokens = 0

    def add(self, step: LayerGradient) -> None:
        """Adds a batch."""
        for sample, inputs, outputs in zip(step.samples, step.inputs, step.outputs, strict=True):
            self._sums[sample >= self._half] += (outputs.T @ inputs).abs_()
        flat = step.inputs.flatten(0, 1).to(torch.float64)
        self._squares += flat.square().sum(dim=0)
        self._tokens += len(flat)

    def compare(self, name: str, weights: Tensor, ratio: float) -> LayerRow:
        """What the halves agree on."""
        first, second = (torch.as_tensor(each) for each in self._sums)
        squares = torch.as_tensor(self._squares) / self._tokens
        kept = round((1 - ratio) * weights.numel())

        def removed(scores: Tensor) -> Tensor:
            return ~select(scores, Unstructured(), kept)

        def share(mask: Tensor) -> float:
            return float(mask.sum()) / (weights.numel() - kept)

        by_wanda = removed(score_wanda(weights, squares))
        unsteady, moved = {}, {}
        for alpha in ALPHAS:
            one, other, both = (
                removed(score_gblm(weights, squares, norms, alpha))
                for norms in (first, second, first + second)
            )
            unsteady[alpha], moved[alpha] = share(one & ~other), share(both & ~by_wanda)
        pair = torch.stack([_within(first).flatten(), _within(second).flatten()])
        return LayerRow(
            name=name,
            correlation=float(torch.corrcoef(pair)[0, 1]),
            unsteady=unsteady,
            moved=moved,
        )


def _within(norms: Tensor) -> Tensor:
    """Logarithms without the means of rows and columns."""
    logs = (norms / norms.mean()).clamp_min(_SMALLEST).log()
    return logs - logs.mean(dim=1, keepdim=True) - logs.mean(dim=0, keepdim=True)


def measure(
    model: Path, *, samples: int, tokens: int, seed: int, every: int, ratio: float
) -> Iterator[LayerRow]:
    """The linears of every few blocks of the decoder."""
    checkpoint = Checkpoint.load(model)
    tokenizer = AutoTokenizer.from_pretrained(model, **STOCK_ONLY)
    text = calibration_set(tokenizer, tokens=tokens, samples=samples, seed=seed)
    wanted = {
        linear.name
        for linear in checkpoint.spec.linears()
        if linear.part == "decoder" and linear.block is not None and linear.block % every == 0
    }
    open_layers: dict[str, HalfNorms] = {}
    for step in walk_gradients(checkpoint, text):
        if step.name not in wanted:
            continue
        norms = open_layers.setdefault(step.name, HalfNorms(samples // 2))
        norms.add(step)
        if step.is_last:
            del open_layers[step.name]
            wanted.remove(step.name)
            yield norms.compare(step.name, checkpoint.form(step.name).dequantize(), ratio)
        if not wanted:
            return


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="Of real_decoder.py.")
    parser.add_argument("--samples", type=int, default=8, help="Of both halves together.")
    parser.add_argument("--tokens", type=int, default=256, help="Of a sample's text.")
    parser.add_argument("--seed", type=int, default=0, help="Calibration set.")
    parser.add_argument("--every", type=int, default=3, help="One block of this many.")
    parser.add_argument("--ratio", type=float, default=0.5, help="Share that is removed.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    model = arguments.work / "model"
    if not model.is_dir():
        parser.error(f"--work {arguments.work}: holds no model; run real_decoder.py first")
    if arguments.samples < 2 or arguments.samples % 2:
        parser.error(f"--samples {arguments.samples}: must be even and at least 2")
    torch.set_num_threads(arguments.threads)
    rows = list(
        measure(
            model,
            samples=arguments.samples,
            tokens=arguments.tokens,
            seed=arguments.seed,
            every=arguments.every,
            ratio=arguments.ratio,
        )
    )
    half = arguments.samples // 2
    correlation = float(np.median([row.correlation for row in rows]))
    print(f"{len(rows)} layers; norms of {half} samples and of {half} others: {correlation:.3f}")
    signal = correlation / (1 - correlation) / half
    for count in SAMPLES:
        print(
            f"  of {count} and {count} others, if so: {count * signal / (1 + count * signal):.3f}"
        )
    for alpha in ALPHAS:
        unsteady = np.median([row.unsteady[alpha] for row in rows])
        moved = np.median([row.moved[alpha] for row in rows])
        print(
            f"alpha {alpha:g}: {unsteady:.1%} of the removed weights by one half alone, "
            f"{moved:.1%} kept by Wanda"
        )
    settings = {key: str(value) for key, value in vars(arguments).items()}
    print(json.dumps({**settings, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
