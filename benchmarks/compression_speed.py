"""How fast weights are quantized: this package beside GPTQ as one writes it from the paper.

    python benchmarks/compression_speed.py --blocks 2 --rounds 3

One decoder block of the shape of SmolVLM-256M after another: seven linears, four inputs. Timed is
everything from a layer's inputs to its stored form: second moments, factorizations, error feedback,
and, on this package's side, judging the result beside round-to-nearest on held-out tokens. The
straightforward implementation is `tests/compress/quantization/straightforward.py`. Rounds are
interleaved; figures are medians, raw samples are in the last line, one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from pocketvlm.calibration.walk.moments import SecondMoment
from pocketvlm.calibration.walk.steps import InputMoments
from pocketvlm.compress.layerwise.hessian import ErrorFeedback, InputHessian
from pocketvlm.compress.quantization.affine.gptq import AffineQuantizer
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.codebook.quantizer import CodebookQuantizer
from pocketvlm.compress.quantization.codebook.stage import CodebookRule
from pocketvlm.compress.quantization.layer_quantizer import LayerQuantizer
from pocketvlm.compress.quantization.rules import Assignment, LayerRule
from pocketvlm.models.layers import LinearSpec
from pocketvlm.weights.dense import DenseWeight

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.compress.quantization.straightforward import hessian_of, straightforward_gptq

RuleT = TypeVar("RuleT", bound=LayerRule)
FEEDBACK = ErrorFeedback(damping=0.01, order="group_aware")
# Inputs of one block of SmolVLM-256M's decoder, and the rows of the linears that read each.
BLOCK: dict[int, list[tuple[int, ...]]] = {
    576: [(576, 192, 192), (576,), (1536, 1536)],
    1536: [(576,)],
}


def inputs_of(width: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Correlated inputs with a few strong channels, [tokens, width]."""
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    scales = torch.exp(torch.randn(width, generator=generator))
    return torch.randn(tokens, width, generator=generator) @ mixing * scales


def block_layers(tokens: int, seed: int) -> list[tuple[Tensor, Tensor, list[Tensor]]]:
    """Fitted inputs, held-out inputs and weights of each shared input."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for width, readers in BLOCK.items():
        for rows in readers:
            inputs = inputs_of(width, tokens, generator)
            held = tokens // 8
            weights = [
                torch.randn(count, width, generator=generator).to(torch.bfloat16) for count in rows
            ]
            steps.append((inputs[held:], inputs[:held], weights))
    return steps


def quantize_ours(
    steps: list[tuple[Tensor, Tensor, list[Tensor]]],
    rule: RuleT,
    method: LayerQuantizer[RuleT],
) -> None:
    """All layers of a block, as a stage does it."""
    for fitted, held_out, weights in steps:
        width = fitted.shape[1]
        moments = [SecondMoment(width), SecondMoment(width)]
        for moment, inputs in zip(moments, (fitted, held_out), strict=True):
            for batch in inputs.split(1024):
                moment.add(batch)
        linears = [
            LinearSpec(
                name=f"{number}",
                part="decoder",
                role="q_proj",
                block=0,
                out_features=weight.shape[0],
                in_features=width,
                has_bias=False,
            )
            for number, weight in enumerate(weights)
        ]
        hessian = InputHessian.from_moments(
            InputMoments(calibration=moments[0], held_out=moments[1]), method.feedback
        )
        for linear, weight in zip(linears, weights, strict=True):
            method.compress(
                Assignment(linear=linear, rule=rule), DenseWeight(values=weight), hessian
            )


def quantize_straightforward(
    steps: list[tuple[Tensor, Tensor, list[Tensor]]], bits: int, group_size: int
) -> None:
    """All layers of a block, from the paper."""
    for fitted, _, weights in steps:
        hessian = hessian_of(fitted)
        for weight in weights:
            straightforward_gptq(weight.float(), hessian, bits=bits, group_size=group_size)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    affine = WeightRule(bits=4, group_size=arguments.group_size)
    vectors = CodebookRule(index_bits=8, vector_length=4)
    runs: dict[str, Callable[[list[tuple[Tensor, Tensor, list[Tensor]]]], None]] = {
        "straightforward GPTQ, int4": lambda steps: quantize_straightforward(
            steps, 4, arguments.group_size
        ),
        "GPTQ, int4": lambda steps: quantize_ours(
            steps, affine, AffineQuantizer(feedback=FEEDBACK)
        ),
        "VPTQ, 2 bits": lambda steps: quantize_ours(
            steps, vectors, CodebookQuantizer(feedback=FEEDBACK)
        ),
    }
    samples: dict[str, list[float]] = {label: [] for label in runs}
    for block in range(arguments.blocks):
        steps = block_layers(arguments.tokens, seed=block)
        for _ in range(arguments.rounds):
            for label, run in runs.items():
                started = time.perf_counter()
                run(steps)
                samples[label].append(time.perf_counter() - started)
    base = statistics.median(samples["straightforward GPTQ, int4"])
    ours = statistics.median(samples["GPTQ, int4"])
    print(f"{'method':<30}{'s a block':>10}{'x paper':>9}{'x GPTQ':>9}")
    for label, values in samples.items():
        middle = statistics.median(values)
        print(f"{label:<30}{middle:>10.2f}{middle / base:>9.2f}{middle / ours:>9.2f}")
    print(json.dumps({"threads": arguments.threads, "seconds": samples}))


if __name__ == "__main__":
    main()
