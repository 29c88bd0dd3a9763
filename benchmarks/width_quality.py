"""FFN channels and KV groups removed, by importance and repair: accuracy of answers right after.

    python benchmarks/width_quality.py --n 500 --calibration-seed 0 1 2

Every row answers the same held-out questions in torch, with nothing trained; differences to the
float model and to plain magnitude are paired. A row is the mean over calibration sets, with what
each of them gave. A row is printed as soon as it is known; the last line is one JSON document.
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
from pocketvlm.compress.pruning.width.flap import Flap
from pocketvlm.compress.pruning.width.stage import PruneWidth
from pocketvlm.compress.pruning.width.taylor import Taylor
from pocketvlm.compress.pruning.width.unit_scores import UnitMagnitude
from pocketvlm.context import RunContext
from pocketvlm.evaluation.score import score_checkpoint

_IMPORTANCES: dict[str, Flap | Taylor | UnitMagnitude] = {
    "magnitude": UnitMagnitude(),
    "taylor": Taylor(),
    "flap": Flap(),
}
_REPAIRS = ("none", "bias", "regression")


def measure(path: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a cut, an importance and a repair of one model, the float model first."""
    questions = held_out_questions(arguments)
    sets = calibration_sets(arguments)
    ctx = RunContext(threads=arguments.threads)
    floats = score_checkpoint(Checkpoint.load(path), questions, ctx=ctx)
    print(f"\n{path.name}: n={floats.n}, blind {floats.blind:.1%}\n", flush=True)
    print(f"| Channels | Groups | By | Repair | {COLUMNS.format(baseline='magnitude')}")
    print(f"| ---: | ---: | --- | --- | {RULE}")
    rows = [
        Row.of(path.name, ("", "", "float", ""), [floats], floats=floats, baseline=None, seconds=0)
    ]
    print(rows[0].spell(), flush=True)
    cuts = [{"decoder_parameters": share} for share in arguments.share]
    cuts += [{"kv_groups": groups} for groups in arguments.kv_groups]
    for cut in cuts:
        baseline: Row | None = None
        for by, importance in _IMPORTANCES.items():
            for repair in arguments.repair:
                stage = PruneWidth(**cut, importance=importance, compensate=repair)
                scores, seconds = [], 0.0
                for calibration in sets:
                    started = time.perf_counter()
                    done = stage.apply(Checkpoint.load(path), calibration, ctx)
                    seconds += (time.perf_counter() - started) / len(sets)
                    scores.append(score_checkpoint(done, questions, blind=False, ctx=ctx))
                widths = stage.widths(Checkpoint.load(path).spec)
                row = Row.of(
                    path.name,
                    (str(widths.ffn), str(widths.kv_groups), by, repair),
                    scores,
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
    parser.add_argument("--share", type=float, nargs="*", default=[0.25, 0.5, 0.65])
    parser.add_argument("--kv-groups", type=int, nargs="*", default=[1], help="Groups that stay.")
    parser.add_argument("--repair", nargs="+", choices=_REPAIRS, default=_REPAIRS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for path in model_folders(arguments):
        rows += measure(path, arguments)
    print(json.dumps({**vars(arguments), "rows": rows}))


if __name__ == "__main__":
    main()
