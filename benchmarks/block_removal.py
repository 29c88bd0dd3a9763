"""Whole decoder blocks removed, by block influence and greedily: accuracy of answers right after.

    python benchmarks/block_removal.py --n 500 --calibration-seed 0 1 2

Every row answers the same held-out questions in torch, with nothing recovered; differences to the
float model and to block influence are paired. A row is the mean over calibration sets, with what
each of them gave and which blocks each of them chose. A row is printed as soon as it is known; the
last line is one JSON document with everything.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from answer_options import answer_parser, calibration_sets, held_out_questions, model_folders
from answer_rows import COLUMNS, RULE, Row

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.depth.block_influence import BlockInfluence
from pocketvlm.compress.pruning.depth.greedy_blocks import Greedy
from pocketvlm.compress.pruning.depth.stage import PruneDepth
from pocketvlm.context import RunContext
from pocketvlm.evaluation.score import Score, score_checkpoint

IMPORTANCES = (BlockInfluence(), Greedy())


def measure(path: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a count of blocks and an importance of one model, the float model first."""
    questions = held_out_questions(arguments)
    sets = calibration_sets(arguments)
    ctx = RunContext(threads=arguments.threads)
    floats = score_checkpoint(Checkpoint.load(path), questions, ctx=ctx)
    print(f"\n{path.name}: n={floats.n}, blind {floats.blind:.1%}\n", flush=True)
    print(f"| Removed | By | Which | {COLUMNS.format(baseline='influence')}")
    print(f"| ---: | --- | --- | {RULE}")
    rows = [
        Row.of(path.name, ("0", "float", ""), [floats], floats=floats, baseline=None, seconds=0)
    ]
    print(rows[0].spell(), flush=True)
    # Calibration sets often agree, and what is left depends on nothing but which blocks went.
    known: dict[tuple[int, ...], Score] = {}
    for count in arguments.blocks:
        baseline: Row | None = None
        for importance in IMPORTANCES:
            stage = PruneDepth(decoder_blocks=count, importance=importance)
            chosen, seconds = [], 0.0
            for calibration in sets:
                started = time.perf_counter()
                done = stage.apply(Checkpoint.load(path), calibration, ctx)
                seconds += (time.perf_counter() - started) / len(sets)
                blocks = tuple(row["block"] for row in done.history[-1].layers if row["removed"])
                chosen.append(blocks)
                if blocks not in known:
                    known[blocks] = score_checkpoint(done, questions, blind=False, ctx=ctx)
            which = " / ".join("+".join(map(str, blocks)) for blocks in chosen)
            row = Row.of(
                path.name,
                (str(count), importance.kind, which),
                [known[blocks] for blocks in chosen],
                floats=floats,
                baseline=baseline,
                seconds=seconds,
            )
            baseline = baseline or row
            rows.append(row)
            print(row.spell(), flush=True)
    return [asdict(row) for row in rows]


def main() -> None:
    """Entry point."""
    parser = answer_parser(__doc__, sets=1)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2], help="How many go.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for path in model_folders(arguments):
        rows += measure(path, arguments)
    print(json.dumps({**vars(arguments), "rows": rows}))


if __name__ == "__main__":
    main()
