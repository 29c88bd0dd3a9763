"""Distillation after a pruner: answers before and after, and what held-out samples say.

    python benchmarks/recovery_quality.py --prune depth:3,5
    python benchmarks/recovery_quality.py --prune magnitude:0.6 --rank 0 --rate 5e-4

Prunes a reference model, distills it from the float model, and answers the same questions with all
three in torch. `--split calibration` asks questions of the calibration split that nothing is
trained on: what options are chosen on. Prints one line per model, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json

import torch

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.distillation.stage import Distill
from pocketvlm.compress.pruning.depth.stage import PruneDepth
from pocketvlm.compress.pruning.unstructured.magnitude import Magnitude
from pocketvlm.compress.pruning.unstructured.pruner import Prune
from pocketvlm.compress.pruning.width.stage import PruneWidth
from pocketvlm.context import Progress, RunContext
from pocketvlm.evaluation.score import score_checkpoint
from pocketvlm.reference import REFERENCE_MODELS, reference_model_path
from pocketvlm.stages import Stage


def pruner(text: str) -> Stage:
    """`magnitude:RATIO`, `width:SHARE` of the decoder's parameters, or `depth:BLOCK,BLOCK`."""
    kind, _, value = text.partition(":")
    if kind == "magnitude":
        return Prune(score=Magnitude(), ratio=float(value))
    if kind == "width":
        return PruneWidth(decoder_parameters=float(value))
    if kind == "depth":
        return PruneDepth(decoder_blocks=tuple(int(block) for block in value.split(",")))
    raise argparse.ArgumentTypeError(f"{text!r}: expected magnitude:, width: or depth:")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=REFERENCE_MODELS, default="pocket-llava")
    parser.add_argument("--prune", type=pruner, default="depth:3,5")
    parser.add_argument("--samples", type=int, default=1536, help="To learn from.")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--rank", type=int, default=16, help="0 for whole matrices.")
    parser.add_argument("--rate", type=float, default=6e-3)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1, help="Seed of the questions.")
    parser.add_argument("--split", choices=("evaluation", "calibration"), default="evaluation")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = reference_model_path(arguments.model)
    questions = CalibrationSet.from_reference(arguments.seed, arguments.n, split=arguments.split)
    learned_from = CalibrationSet.from_reference(0, arguments.samples)

    def show(progress: Progress) -> None:
        if "held out" in progress.note:
            print(f"  step {progress.done}: {progress.note}", flush=True)

    ctx = RunContext(threads=arguments.threads, source_dir=path, on_progress=show)
    stage = Distill(
        rank=arguments.rank or None,
        rate=arguments.rate,
        steps=arguments.steps,
        check_every=max(1, arguments.steps // 4),
    )
    checkpoint = Checkpoint.load(path)
    scores = {"float": score_checkpoint(checkpoint, questions, blind=False, ctx=ctx)}
    checkpoint = arguments.prune.apply(checkpoint, learned_from.take(128), ctx)
    scores["pruned"] = score_checkpoint(checkpoint, questions, blind=False, ctx=ctx)
    checkpoint = stage.apply(checkpoint, learned_from, ctx)
    scores["recovered"] = score_checkpoint(checkpoint, questions, blind=False, ctx=ctx)
    record = checkpoint.history[-1]
    print(
        f"{arguments.model}: "
        + ", ".join(
            f"{label} {score.accuracy:.1%} [{score.interval_low:.1%}, {score.interval_high:.1%}]"
            for label, score in scores.items()
        )
        + f"; {scores['recovered'].accuracy / scores['float'].accuracy:.1%} of float"
        + f" after {record.seconds:.0f} s",
        flush=True,
    )
    print(
        json.dumps(
            {
                "model": arguments.model,
                "accuracy": {label: score.accuracy for label, score in scores.items()},
                "n": arguments.n,
                "before": record.metrics["before"],
                "after": record.metrics["after"],
                "best_step": record.metrics["best_step"],
            }
        )
    )


if __name__ == "__main__":
    main()
