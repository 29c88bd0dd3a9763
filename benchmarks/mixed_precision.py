"""Mixed precision against uniform GPTQ of the same size: accuracy of answers.

    python benchmarks/mixed_precision.py --n 500

Sensitivity is measured once per model; every budget is solved from the same table. A mixed row has
the bytes of the uniform row above it, or fewer; further budgets are averages of bits per weight.
Every row answers the same held-out questions in torch. Prints a table for each model, and one JSON
line at the end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from answer_options import answer_parser, held_out_questions, model_folders

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.affine.gptq import Gptq
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.mixed.stage import MixedPrecision
from pocketvlm.context import RunContext
from pocketvlm.evaluation.score import compare_scores, score_checkpoint
from pocketvlm.json_io import write_json

MENU = tuple(
    WeightRule(bits=bits, group_size=group_size) for bits in (2, 3, 4, 8) for group_size in (64, 32)
)


def measure(path: Path, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row a configuration of one model, the float model first."""
    samples = held_out_questions(arguments)
    calibration = CalibrationSet.from_reference(0, arguments.samples)
    ctx = RunContext(threads=arguments.threads)
    whole = Checkpoint.load(path)
    weights = sum(form.shape[0] * form.shape[1] for form in whole.forms().values())
    baseline = score_checkpoint(whole, samples, blind=False, ctx=ctx)
    print(f"\n{path.name}: float {baseline.accuracy:.1%}, n={baseline.n}", flush=True)
    rows: list[dict[str, Any]] = []

    def add(label: str, stage: Gptq | MixedPrecision) -> int:
        started = time.perf_counter()
        done = stage.apply(Checkpoint.load(path), calibration, ctx)
        seconds = time.perf_counter() - started
        score = score_checkpoint(done, samples, blind=False, ctx=ctx)
        paired = compare_scores(baseline, score)
        stored = sum(form.stored_bytes for form in done.forms().values())
        metrics = done.history[-1].metrics
        gained = [paired.difference, paired.interval_low, paired.interval_high]
        row = {
            "model": path.name,
            "method": label,
            "bits_per_weight": 8 * stored / weights,
            "weight_bytes": stored,
            "accuracy": score.accuracy,
            "points_gained": [100 * value for value in gained],
            "predicted_divergence": metrics.get("predicted_divergence"),
            "seconds": seconds,
        }
        rows.append(row)
        print(
            f"  {label:<24}{row['bits_per_weight']:>6.3f} bits  {score.accuracy:>6.1%}  "
            f"{100 * gained[0]:+.1f} [{100 * gained[1]:+.1f}, {100 * gained[2]:+.1f}]  "
            f"{seconds:.0f} s",
            flush=True,
        )
        if "sensitivity" in metrics:
            write_json(folder / f"{path.name}.json", metrics["sensitivity"])
        return stored

    def mixed(**budget: Any) -> MixedPrecision:
        table = folder / f"{path.name}.json"
        given = str(table) if table.is_file() else None
        return MixedPrecision(
            options=MENU, sensitivity=given, samples=arguments.sensitivity_samples, **budget
        )

    for average in arguments.average:
        add(f"mixed, {average:g} bits", mixed(average_bits=average))
    for text in arguments.uniform:
        bits, group_size = map(int, text.split("x"))
        rule = WeightRule(bits=bits, group_size=group_size)
        size = add(f"uniform {bits}, groups of {group_size}", Gptq(rules=(rule,)))
        if rule != MENU[0]:  # of which nothing is smaller
            add("mixed, same size", mixed(budget_bytes=size))
    return rows


def main() -> None:
    """Entry point."""
    parser = answer_parser(__doc__, sets=None)
    parser.add_argument("--sensitivity-samples", type=int, default=24)
    parser.add_argument("--average", type=float, nargs="*", default=[2.5, 3.0])
    parser.add_argument(
        "--uniform", nargs="*", default=["2x64", "2x32", "3x64", "3x32"], help="Bits x group."
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for path in model_folders(arguments):
            rows += measure(path, arguments, Path(folder))
    print(json.dumps({"seed": arguments.seed, "rows": rows}))


if __name__ == "__main__":
    main()
