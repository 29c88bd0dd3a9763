"""How well torch predicts an ONNX bundle, with and without the runtime's rounding of activations.

    python benchmarks/runtime_arithmetic.py RUN [RUN ...] --n 300

RUN is a folder that `pocketvlm compress` wrote for the ONNX target. Each question is answered by
the bundle, by the checkpoint in float32, and by the checkpoint under ONNX Runtime's arithmetic.
Prints a table, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pocketvlm.bundle import Bundle
from pocketvlm.calibration.source import CalibrationSet, Sample
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.evaluation.answers import exact_match
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.processor import user_message
from pocketvlm.reference_graph.activation_rounding import Arithmetic, simulate_activations
from pocketvlm.reference_graph.forward import (
    decode_logits,
    embed_prompts,
    encode_images,
    greedy_generate,
)
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.onnx.runner import OnnxRunner
from pocketvlm.weights.modules import cache_dense_weights

_NEW_TOKENS = 16
_ARITHMETICS: tuple[Arithmetic, ...] = ("float32", "onnx")


def compare(run: Path, n: int, seed: int) -> dict[str, Any]:
    """Answers `n` held-out questions three times."""
    checkpoint = load_checkpoint(run / "checkpoint")
    bundle = Bundle.open(run / "bundle")
    runner = OnnxRunner(bundle)
    conversation = Conversation(bundle, runner=runner)
    errors: dict[str, list[float]] = {name: [] for name in _ARITHMETICS}
    equal = dict.fromkeys(_ARITHMETICS, 0)
    right = dict.fromkeys((*_ARITHMETICS, "bundle"), 0.0)
    with cache_dense_weights(checkpoint.model):
        for sample in CalibrationSet.from_reference(seed=seed, n=n, split="evaluation"):
            conversation.reset()
            answer = conversation.ask(
                sample.question, sample.open_image(), max_new_tokens=_NEW_TOKENS
            )
            right["bundle"] += exact_match(answer.text, sample.answer)
            for name in _ARITHMETICS:
                with torch.inference_mode(), simulate_activations(checkpoint, name):
                    tokens, logits, inputs = _answer(checkpoint, sample)
                runner.reset()
                found = runner.decode(inputs.embeds.numpy(), inputs.positions.numpy())
                errors[name].append(float(np.sqrt(np.square(found - logits).mean())))
                equal[name] += list(answer.token_ids) == tokens
                text = checkpoint.processor.decode(tokens)
                right[name] += exact_match(text, sample.answer)
    return {
        "run": run.name,
        "n": n,
        "cache_bytes": runner.cache_bytes,
        "cache_rows": runner.capacity,
        **{f"logits_rms_{name}": float(np.median(errors[name])) for name in _ARITHMETICS},
        **{f"tokens_equal_{name}": equal[name] / n for name in _ARITHMETICS},
        **{f"accuracy_{name}": value / n for name, value in right.items()},
    }


def _answer(checkpoint: Checkpoint, sample: Sample) -> tuple[list[int], np.ndarray, Any]:
    ids = checkpoint.processor.encode([user_message(sample.question)])
    visual = encode_images(checkpoint, checkpoint.processor.pixels([sample.open_image()]))
    inputs = embed_prompts(checkpoint, torch.tensor([ids]), visual)
    (tokens,) = greedy_generate(
        checkpoint,
        inputs,
        max_new_tokens=_NEW_TOKENS,
        eos_token_ids=checkpoint.processor.eos_token_ids,
    )
    return tokens, decode_logits(checkpoint, inputs, last_only=True)[0, 0].numpy(), inputs


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--seed", type=int, default=11)
    arguments = parser.parse_args()
    rows = [compare(run, arguments.n, arguments.seed) for run in arguments.runs]
    print(f"{'run':<26} {'against':<8} {'logits RMS':>11} {'tokens equal':>13} {'right':>7}")
    for row in rows:
        for name in _ARITHMETICS:
            print(
                f"{row['run']:<26} {name:<8} {row[f'logits_rms_{name}']:>11.2e} "
                f"{row[f'tokens_equal_{name}']:>13.2%} {row[f'accuracy_{name}']:>7.2%}"
            )
        print(f"{row['run']:<26} {'bundle':<8} {'':>11} {'':>13} {row['accuracy_bundle']:>7.2%}")
    print(json.dumps({"benchmark": "runtime_arithmetic", "rows": rows}))


if __name__ == "__main__":
    main()
