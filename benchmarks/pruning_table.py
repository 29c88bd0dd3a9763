"""Every pruning score with every allocation at every sparsity: accuracy of answers.

    python benchmarks/pruning_table.py --n 500 --calibration-seed 0 1 2

Tower, projector and decoder are pruned in one budget; embedding and head stay. Every row answers
the same held-out questions in torch, so differences to the float model and to Wanda with a uniform
budget are paired. A row is the mean over calibration sets, with what each of them gave. Nothing is
chosen on these questions. A row is printed as soon as it is known; the last line is one JSON
document with everything.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from answer_options import answer_parser, calibration_sets, held_out_questions, model_folders
from answer_rows import COLUMNS, RULE, Row
from shared_scores import SharedEcoflap

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.unstructured.allocation import Uniform
from pocketvlm.compress.pruning.unstructured.ecoflap import Ecoflap
from pocketvlm.compress.pruning.unstructured.gblm import Gblm
from pocketvlm.compress.pruning.unstructured.magnitude import Magnitude
from pocketvlm.compress.pruning.unstructured.patterns import Pattern, SemiStructured, Unstructured
from pocketvlm.compress.pruning.unstructured.pruner import Prune, Score
from pocketvlm.compress.pruning.unstructured.sparsegpt import SparseGpt
from pocketvlm.compress.pruning.unstructured.wanda import Wanda
from pocketvlm.context import RunContext
from pocketvlm.evaluation.score import score_checkpoint

SCORES: dict[str, Score] = {
    "Wanda": Wanda(),
    "magnitude": Magnitude(),
    "GBLM": Gblm(),
    "GBLM, shrunk": Gblm(shrink=True),
    "SparseGPT": SparseGpt(),
}
ALLOCATIONS: dict[str, Uniform | Ecoflap] = {
    "uniform": Uniform(),
    "ECoFLaP, zeroth order": Ecoflap(order="zeroth"),
    "ECoFLaP, first order": Ecoflap(order="first"),
}
_TWO_OF_FOUR = "2:4"


def measure(path: Path, arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """One row a sparsity, allocation and score of one model, the float model first."""
    samples = held_out_questions(arguments)
    sets = calibration_sets(arguments)
    ctx = RunContext(threads=arguments.threads)
    floats = score_checkpoint(Checkpoint.load(path), samples, ctx=ctx)
    first = Row.of(
        path.name, ("0 %", "", "float", ""), [floats], floats=floats, baseline=None, seconds=0
    )
    print(f"\n{path.name}: n={floats.n}, blind {floats.blind:.1%}\n", flush=True)
    print(f"| Removed | Allocation | Score | By part | {COLUMNS.format(baseline='Wanda')}")
    print(f"| ---: | --- | --- | --- | {RULE}")
    print(first.spell(), flush=True)
    rows = [first]
    for removed in arguments.removed:
        pattern: Pattern = SemiStructured() if removed == _TWO_OF_FOUR else Unstructured()
        ratio = pattern.fixed_ratio or float(removed) / 100
        wanda: Row | None = None
        for allocation in arguments.allocation:
            if removed == _TWO_OF_FOUR and allocation != "uniform":
                continue  # 2 of 4 leaves nothing to share out
            chosen = ALLOCATIONS[allocation]
            if isinstance(chosen, Ecoflap):
                chosen = SharedEcoflap(**asdict(chosen), folder=scratch)
            for score in arguments.score:
                stage = Prune(
                    score=SCORES[score],
                    ratio=ratio,
                    pattern=pattern,
                    allocation=chosen,
                )
                scores, seconds = [], 0.0
                for calibration in sets:
                    started = time.perf_counter()
                    done = stage.apply(Checkpoint.load(path), calibration, ctx)
                    seconds += (time.perf_counter() - started) / len(sets)
                    scores.append(score_checkpoint(done, samples, blind=False, ctx=ctx))
                shown = removed if removed == _TWO_OF_FOUR else f"{removed} %"
                keys = (shown, allocation, score, _by_part(done))
                row = Row.of(
                    path.name, keys, scores, floats=floats, baseline=wanda, seconds=seconds
                )
                if (allocation, score) == ("uniform", "Wanda"):
                    wanda = row
                rows.append(row)
                print(row.spell(), flush=True)
    return [asdict(row) for row in rows]


def _by_part(checkpoint: Checkpoint) -> str:
    """Share of zeros in the weights of tower, projector and decoder."""
    shares = []
    for part in ("tower", "projector", "decoder"):
        forms = [form for linear, form in checkpoint.forms().items() if linear.part == part]
        weights = sum(form.shape[0] * form.shape[1] for form in forms)
        zeros = sum(int((form.dequantize() == 0).sum()) for form in forms)
        shares.append(f"{100 * zeros / weights:.0f}")
    return " / ".join(shares)


def main() -> None:
    """Entry point."""
    parser = answer_parser(__doc__, sets=1)
    parser.add_argument("--removed", nargs="+", default=["30", "50", "60", "70", _TWO_OF_FOUR])
    parser.add_argument("--score", nargs="+", default=list(SCORES), choices=list(SCORES))
    parser.add_argument(
        "--allocation", nargs="+", default=list(ALLOCATIONS), choices=list(ALLOCATIONS)
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    with TemporaryDirectory() as scratch:
        for path in model_folders(arguments):
            rows += measure(path, arguments, Path(scratch))
    print(json.dumps({**vars(arguments), "rows": rows}))


if __name__ == "__main__":
    main()
