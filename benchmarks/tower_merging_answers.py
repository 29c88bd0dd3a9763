"""What merging tokens inside the tower costs in answers, beside fewer tokens after it.

    python benchmarks/tower_merging_answers.py --n 480

Greedy answers of the float reference models in torch, exact match, on the same held-out questions
for every row; what is lost stands with its paired 95 % interval. Half of the patches remain.
`reduce_tokens` keeps half of the tokens after the tower, which makes no tower faster, and stands
there to compare. Prints a table, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

import torch

from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens import ReduceTokens
from pocketvlm.compress.tokens.tower.mergers import MergeImportant, MergeNeighbours
from pocketvlm.compress.tokens.tower.stage import MergeTokens
from pocketvlm.context import RunContext
from pocketvlm.evaluation.score import compare_scores, score_checkpoint
from pocketvlm.reference import reference_model_path
from pocketvlm.stages import Stage

_STAGES: Mapping[str, Stage] = {
    "similar, blocks 0 and 1": MergeTokens(),
    "similar, blocks 1 and 2": MergeTokens(first_block=1),
    "similar, block 1": MergeTokens(first_block=1, blocks=1),
    "important, distinct": MergeTokens(merger=MergeImportant(), first_block=1, blocks=1),
    "important, attention": MergeTokens(
        merger=MergeImportant(score="attention"), first_block=1, blocks=1
    ),
    "neighbours, 1 x 2": MergeTokens(merger=MergeNeighbours(), first_block=1, blocks=1),
    "reduce_tokens, auto": ReduceTokens(),
}


def main() -> None:
    """Scores every stage on every model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", default=["pocket-llava", "pocket-smol"])
    parser.add_argument("--n", type=int, default=480, help="questions")
    parser.add_argument("--seed", type=int, default=1, help="seed of the held-out questions")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    samples = CalibrationSet.from_reference(asked.seed, asked.n, split="evaluation")
    rows = []
    for model in asked.model:
        whole = Checkpoint.load(reference_model_path(model))
        baseline = score_checkpoint(whole, samples, blind=False)
        print(f"{model}: {baseline.accuracy:.1%} with every patch, n={baseline.n}", flush=True)
        for name, stage in _STAGES.items():
            merged = stage.apply(whole, samples, RunContext(threads=1))
            score = score_checkpoint(merged, samples, blind=False)
            change = compare_scores(baseline, score)
            points = [
                100 * value
                for value in (change.difference, change.interval_low, change.interval_high)
            ]
            print(
                f"  {name:<32}{score.accuracy:6.1%}  "
                f"{points[0]:+.1f} [{points[1]:+.1f}, {points[2]:+.1f}]",
                flush=True,
            )
            rows.append(
                {"model": model, "stage": name, "accuracy": score.accuracy, "points": points}
            )
    print(json.dumps({"n": asked.n, "seed": asked.seed, "rows": rows}))


if __name__ == "__main__":
    main()
