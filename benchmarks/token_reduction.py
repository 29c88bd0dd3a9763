"""What each visual-token reduction costs: accuracy by method, share kept and position policy.

    python benchmarks/token_reduction.py --n 500

Every row answers the same held-out questions with the float model in torch, so that differences
are paired. Prints a table for each model, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens import REDUCERS, ReduceTokens
from pocketvlm.compress.tokens.baseline.random_tokens import RandomTokens
from pocketvlm.evaluation.score import Score, compare_scores, score_checkpoint
from pocketvlm.models.reducer import POSITION_POLICIES, PositionPolicy
from pocketvlm.reference import REFERENCE_MODELS, reference_model_path

_RANDOM_SEEDS = (0, 1)


def configurations(
    checkpoint: Checkpoint,
    shares: list[float],
    kinds: list[str],
    policies: Sequence[PositionPolicy],
) -> Iterator[ReduceTokens]:
    """Every stage that suits the model; random tokens with several seeds, for one may be lucky."""
    for share in shares:
        for kind in kinds:
            if kind == "cls_attention" and not checkpoint.spec.tower.has_cls:
                continue
            reducers: list[Any] = [REDUCERS[kind]()]
            if kind == "random_tokens":
                reducers = [RandomTokens(seed=seed) for seed in _RANDOM_SEEDS]
            for positions in policies:
                for reducer in reducers:
                    yield ReduceTokens(reducer=reducer, keep=share, positions=positions)


def measure(
    name: str,
    samples: CalibrationSet,
    shares: list[float],
    kinds: list[str],
    policies: Sequence[PositionPolicy],
) -> list[dict[str, Any]]:
    """One row a configuration, all tokens first."""
    whole = Checkpoint.load(reference_model_path(name))
    baseline = score_checkpoint(whole, samples)
    print(f"\n{name}: all {whole.spec.visual_tokens} visual tokens, n={baseline.n}")
    print(f"  {_spell(baseline)}  blind {baseline.blind:.1%}")
    header = ("reducer", "keep", "positions", "accuracy [95 %]", "points lost [95 %]")
    print("  {:<20}{:>5}  {:<12}{:<24}{}".format(*header))
    rows = [_row(name, None, baseline, baseline, whole.spec.visual_tokens)]
    pooled: dict[tuple[float | int, str], list[Score]] = {}
    for stage in configurations(whole, shares, kinds, policies):
        reducer = stage.build(whole.spec)
        score = score_checkpoint(replace(whole, reducer=reducer), samples, blind=False)
        rows.append(_row(name, stage, score, baseline, reducer.keep))
        if stage.reducer.kind == "random_tokens":
            seeds = pooled.setdefault((stage.keep, stage.positions), [])
            seeds.append(score)
            if len(seeds) < len(_RANDOM_SEEDS):
                continue
            mean = sum(other.accuracy for other in seeds) / len(seeds)
            low, high = min(s.accuracy for s in seeds), max(s.accuracy for s in seeds)
            print(
                f"  {stage.reducer.kind:<20}{reducer.keep:>5}  {stage.positions:<12}"
                f"{mean:>6.1%} ({low:.1%} to {high:.1%} of {len(seeds)} seeds)",
                flush=True,
            )
            continue
        lost = rows[-1]["points_lost"]
        print(
            f"  {stage.reducer.kind:<20}{reducer.keep:>5}  {stage.positions:<12}{_spell(score):<24}"
            f"{lost[0]:+.1f} [{lost[1]:+.1f}, {lost[2]:+.1f}]",
            flush=True,
        )
    return rows


def _row(
    name: str, stage: ReduceTokens | None, score: Score, baseline: Score, keep: int
) -> dict[str, Any]:
    paired = compare_scores(baseline, score)
    lost = (0 - paired.difference, 0 - paired.interval_high, 0 - paired.interval_low)
    return {
        "model": name,
        "reducer": asdict(stage.reducer) if stage else None,
        "positions": stage.positions if stage else "original",
        "keep": keep,
        "n": score.n,
        "accuracy": score.accuracy,
        "interval": [score.interval_low, score.interval_high],
        "blind": score.blind,
        "points_lost": [100 * value for value in lost],
        "per_kind": {kind: row.accuracy for kind, row in score.per_kind.items()},
    }


def _spell(score: Score) -> str:
    return f"{score.accuracy:>6.1%} [{score.interval_low:.1%}, {score.interval_high:.1%}]"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", action="append", choices=REFERENCE_MODELS)
    parser.add_argument("--reducer", action="append", choices=REDUCERS)
    parser.add_argument("--positions", action="append", choices=POSITION_POLICIES)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1, help="Seed of the held-out questions.")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5, 0.25, 0.1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    samples = CalibrationSet.from_reference(arguments.seed, arguments.n, split="evaluation")
    started = time.perf_counter()
    policies = arguments.positions or POSITION_POLICIES
    kinds = arguments.reducer or [kind for kind in REDUCERS if kind != "auto"]
    rows = [
        row
        for name in arguments.model or REFERENCE_MODELS
        for row in measure(name, samples, arguments.keep, kinds, policies)
    ]
    document = {"seed": arguments.seed, "seconds": time.perf_counter() - started, "rows": rows}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
