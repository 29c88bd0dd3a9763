"""How often the bundle generates exactly the tokens of the quantized torch model.

    python benchmarks/agreement.py RUN [RUN ...] --n 500 [--target coreml]

RUN is a folder that `pocketvlm compress` wrote. A Core ML bundle is computed by the reference
evaluator, which is not Core ML. Prints a table, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from pocketvlm.bundle import Bundle
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.processor import user_message
from pocketvlm.reference_graph.forward import embed_prompts, encode_images, greedy_generate
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.engines import ENGINES, open_engine
from pocketvlm.weights.modules import cache_dense_weights

_NEW_TOKENS = 16


def compare(run: Path, n: int, seed: int, target: str) -> dict[str, Any]:
    """Answers `n` held-out questions twice."""
    checkpoint = load_checkpoint(run / "checkpoint")
    bundle = Bundle.open(run / "bundle")
    conversation = Conversation(bundle, runner=open_engine(bundle, target))
    eos = checkpoint.processor.eos_token_ids
    equal = same_text = 0
    with cache_dense_weights(checkpoint.model), torch.inference_mode():
        for sample in CalibrationSet.from_reference(seed=seed, n=n, split="evaluation"):
            image = sample.open_image()
            ids = checkpoint.processor.encode([user_message(sample.question)])
            visual = encode_images(checkpoint, checkpoint.processor.pixels([image]))
            inputs = embed_prompts(checkpoint, torch.tensor([ids]), visual)
            (expected,) = greedy_generate(
                checkpoint, inputs, max_new_tokens=_NEW_TOKENS, eos_token_ids=eos
            )
            conversation.reset()
            answer = conversation.ask(sample.question, image, max_new_tokens=_NEW_TOKENS)
            equal += list(answer.token_ids) == expected
            same_text += answer.text == checkpoint.processor.decode(expected)
    return {
        "run": run.name,
        "target": target,
        "n": n,
        "tokens_equal": equal / n,
        "texts_equal": same_text / n,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--target", choices=sorted(ENGINES), default="onnx")
    parser.add_argument("--seed", type=int, default=11)
    arguments = parser.parse_args()
    rows = [compare(run, arguments.n, arguments.seed, arguments.target) for run in arguments.runs]
    print(f"{'run':<24} {'target':<10} {'n':>5} {'tokens equal':>13} {'texts equal':>12}")
    for row in rows:
        share = f"{row['tokens_equal']:>13.2%} {row['texts_equal']:>12.2%}"
        print(f"{row['run']:<24} {row['target']:<10} {row['n']:>5} {share}")
    print(json.dumps({"benchmark": "agreement", "rows": rows}))


if __name__ == "__main__":
    main()
