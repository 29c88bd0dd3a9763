"""Searched schedules of visual tokens inside the decoder, beside constant ones of the same cost.

    python benchmarks/schedule_search.py reference:pocket-llava --macs 0.5

G-Search and P-Sigmoid search on calibration samples; FastV keeps one share after its first layers,
the largest that costs no more than each. All are judged on held-out questions: an answer is right
where greedy generation would write all of it. Prints a table, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pocketvlm.bundle import VisualSchedule
from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.gradients.schedule_trials import GivenAnswers, ScheduleTrials
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.schedule.budget import Macs
from pocketvlm.compress.tokens.schedule.fast_v import FastV
from pocketvlm.compress.tokens.schedule.g_search import GSearch
from pocketvlm.compress.tokens.schedule.kind import ScheduleKind
from pocketvlm.compress.tokens.schedule.p_sigmoid import PSigmoid
from pocketvlm.compress.tokens.schedule.prefill_macs import PrefillMacs
from pocketvlm.context import RunContext
from pocketvlm.evaluation.intervals import compare_paired
from pocketvlm.pipeline.sources import resolve_model


def constant_share(
    share: Callable[[VisualSchedule | None], float],
    macs: float,
    layers: int,
    checkpoint: Checkpoint,
) -> VisualSchedule | None:
    """FastV with the most tokens that cost no more; `None` where one token costs more."""
    tokens, depth = checkpoint.spec.visual_tokens, checkpoint.spec.decoder.depth
    found = None
    for keep in range(1, tokens):
        schedule = FastV(first_layers=layers, keep=keep).plan(depth, tokens)
        if share(schedule) <= macs:
            found = schedule
    return found


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per schedule."""
    checkpoint = Checkpoint.load(resolve_model(options.model))
    calibration = CalibrationSet.from_reference(options.seed, options.samples)
    held_out = CalibrationSet.from_reference(options.seed + 1, options.n, split="evaluation")
    trials = ScheduleTrials(checkpoint, held_out)
    share = PrefillMacs.of(checkpoint.spec, trials.prompt_rows).share
    rows: list[dict[str, Any]] = []
    judged: dict[str, GivenAnswers] = {"no drop": trials.plain}

    def judge(name: str, schedule: VisualSchedule | None, beside: str, **facts: Any) -> None:
        judged[name] = trials.answers(schedule)
        pairs = {
            other: asdict(
                compare_paired(
                    judged[other].is_right.double().tolist(),
                    judged[name].is_right.double().tolist(),
                )
            )
            for other in dict.fromkeys(("no drop", beside))
        }
        rows.append(
            {
                "name": name,
                "schedule": None if schedule is None else schedule.describe(),
                "macs_share": share(schedule),
                "accuracy": judged[name].right / options.n,
                "loss": judged[name].loss,
                "beside": beside,
                "pairs": pairs,
                **facts,
            }
        )
        print_row(rows[-1])

    def search(name: str, kind: ScheduleKind) -> None:
        start = time.perf_counter()
        found = kind.find(checkpoint, calibration, RunContext())
        seconds = time.perf_counter() - start
        macs = share(found.schedule)
        for layers in (1, 2):
            constant = constant_share(share, macs, layers, checkpoint)
            if constant is not None:
                judge(f"FastV K={layers} at the cost of {name}", constant, "no drop")
        beside = f"FastV K=1 at the cost of {name}"
        judge(name, found.schedule, beside, seconds=seconds, search=dict(found.metrics))

    judge("no drop", None, "no drop")
    if options.g_search:
        search("G-Search", GSearch())
        search("G-Search by answers alone", GSearch(loss_tolerance=None))
    for macs in options.macs:
        search(
            f"P-Sigmoid, macs {macs:g}", PSigmoid(budget=Macs(share=macs), trials=options.trials)
        )
    return rows


def print_row(row: dict[str, Any]) -> None:
    """One line, and one for what it is compared with."""
    print(
        f"{row['name']:<44} macs {row['macs_share']:.3f}  right {row['accuracy']:.1%}  "
        f"loss {row['loss']:.4f}  {row['schedule'] or ''}",
        flush=True,
    )
    for other, pair in row["pairs"].items():
        if other != row["name"]:
            low, high = pair["interval_low"] * 100, pair["interval_high"] * 100
            print(f"    against {other}: {pair['difference'] * 100:+.1f} [{low:+.1f}, {high:+.1f}]")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a reference model")
    parser.add_argument("--macs", type=float, nargs="*", default=[0.5])
    parser.add_argument("--g-search", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--samples", type=int, default=384, help="calibration samples")
    parser.add_argument("--n", type=int, default=1500, help="held-out questions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = measure(options)
    print(json.dumps({"benchmark": "schedule_search", "model": options.model, "rows": rows}))


if __name__ == "__main__":
    main()
