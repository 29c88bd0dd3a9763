"""What it saves, and costs, that visual tokens leave the decoder on the way.

    python benchmarks/visual_schedule.py --work shapes --speed
    python benchmarks/visual_schedule.py --quality reference:pocket-llava

`--speed`: prefill and one step of decoding of ONNX bundles of a published shape with random
weights, all of them in turns in one process, and the bytes of KV cache that a prompt leaves.
`--quality`: accuracy of a reference model on held-out questions in torch, in pairs with the model
that drops nothing, and beside it a baseline of as many visual rows in every layer, evenly spaced;
`--distill N` adds rows with N steps of distillation after the drops. Schedules are given as in a
recipe. Prints tables, and one JSON line with every raw sample at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from shape_bundles import bundle_of

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.distillation.stage import Distill
from pocketvlm.compress.tokens.baseline.uniform_stride import UniformStride
from pocketvlm.compress.tokens.schedule.stage import DropTokens
from pocketvlm.compress.tokens.stage import ReduceTokens
from pocketvlm.context import RunContext
from pocketvlm.evaluation.score import Score, compare_scores, score_checkpoint
from pocketvlm.pipeline.sources import resolve_model
from pocketvlm.recipes.load import recipe_from_document
from pocketvlm.reference.random_models import write_shape
from pocketvlm.reference.shapes import load_shape
from pocketvlm.runtime.onnx.runner import OnnxRunner

_SPEED_SCHEDULES = (
    "{kind: exit, first_layers: 0.5}",
    "{kind: fast_v, first_layers: 2, keep: 0.5}",
    "{kind: fast_v, first_layers: 2, keep: 0.25}",
    "{kind: pyramid_drop}",
    "{kind: progressive}",
)
_QUALITY_SCHEDULES = (
    "{kind: exit, first_layers: 5}",
    "{kind: exit, first_layers: 4}",
    "{kind: exit, first_layers: 3}",
    "{kind: exit, first_layers: 2}",
    "{kind: exit, first_layers: 1}",
    "{kind: fast_v, first_layers: 2, keep: 0.5}",
    "{kind: fast_v, first_layers: 2, keep: 0.25}",
    "{kind: fast_v, first_layers: 1, keep: 0.25}",
    "{kind: pyramid_drop, stages: 3}",
    "{kind: pyramid_drop, stages: 3, positions: original}",
    "{kind: progressive}",
)
Make = Callable[[], Checkpoint]


def stage_of(schedule: str) -> DropTokens:
    """The stage of a schedule as a recipe gives it."""
    stage = {"method": "drop_tokens", "schedule": yaml.safe_load(schedule)}
    (made,) = recipe_from_document({"schema": 1, "stages": [stage]}, where="--schedules").stages
    return cast("DropTokens", made)


def dropping(stage: DropTokens | None, make: Make) -> Checkpoint:
    """A model with a schedule that needs no samples."""
    checkpoint = make()
    if stage is None:
        return checkpoint
    spec = checkpoint.spec
    schedule = stage.schedule.plan(spec.decoder.depth, spec.visual_tokens)
    return replace(checkpoint, visual_schedule=schedule)


def measure_speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prefill and decoding of bundles that differ in their schedules, in turns."""
    runners: dict[tuple[str, str], OnnxRunner] = {}
    model = write_shape(load_shape(options.shape), options.work / options.shape, is_split=False)
    for recipe in options.recipes:
        for number, name in enumerate(("none", *options.schedules)):
            stage = None if name == "none" else stage_of(name)

            def make(stage: DropTokens | None = stage) -> Checkpoint:
                return dropping(stage, lambda: Checkpoint.load(model))

            folder = options.work / f"{options.shape}-{recipe}-schedule-{number}"
            bundle = bundle_of(make, recipe, folder)
            runners[recipe, name] = OnnxRunner(bundle, threads=options.threads, keep_vision=False)
    rows = options.visual + options.text
    is_visual = np.zeros(rows, np.bool_)
    is_visual[options.text // 4 : options.text // 4 + options.visual] = True
    width = next(iter(runners.values())).embed([5]).shape[-1]
    embeds = np.random.default_rng(0).standard_normal((1, rows, width)).astype(np.float32) * 0.02
    positions = np.arange(rows, dtype=np.int64)[None]
    samples: dict[tuple[str, str], dict[str, list[float]]] = {}
    held: dict[tuple[str, str], int] = {}
    for number in range(options.rounds + 1):
        for key, runner in runners.items():
            runner.reset()
            start = time.perf_counter()
            runner.decode(embeds, positions, is_visual)
            prefill = time.perf_counter() - start
            held[key] = runner.held_bytes
            start = time.perf_counter()
            for step in range(options.steps):
                runner.decode(runner.embed([7]), np.array([[rows + step]], np.int64))
            decode = (time.perf_counter() - start) / options.steps
            if number:  # the first round warms up
                found = samples.setdefault(key, {"prefill_ms": [], "step_ms": []})
                found["prefill_ms"].append(prefill * 1e3)
                found["step_ms"].append(decode * 1e3)
    return [
        {
            "recipe": recipe,
            "schedule": name,
            "visual_rows": options.visual,
            "text_rows": options.text,
            "kv_bytes": held[recipe, name],
            **samples[recipe, name],
        }
        for recipe, name in runners
    ]


def print_speed(rows: list[dict[str, Any]]) -> None:
    """Medians, and what each row takes of the one that drops nothing, in the same rounds."""
    print(
        f"{'recipe':<14} {'prefill ms':>11} {'':>6} {'step ms':>8} {'':>6} {'KV MB':>7}  schedule"
    )
    whole: dict[str, Any] = {}
    for row in rows:
        whole = row if row["schedule"] == "none" else whole
        prefill, step = (
            statistics.median(a / b for a, b in zip(row[key], whole[key], strict=True))
            for key in ("prefill_ms", "step_ms")
        )
        print(
            f"{row['recipe']:<14} {statistics.median(row['prefill_ms']):>11.1f} {prefill:>6.2f} "
            f"{statistics.median(row['step_ms']):>8.2f} {step:>6.2f} {row['kv_bytes'] / 1e6:>7.2f}"
            f"  {row['schedule']}"
        )


def measure_quality(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy by schedule, in pairs with the model that drops nothing."""
    path = resolve_model(options.quality)
    held_out = list(CalibrationSet.from_reference(1, options.n, split="evaluation"))
    calibration = CalibrationSet.from_reference(options.seed, options.samples)
    ctx = RunContext(threads=options.threads, seed=options.seed, source_dir=path)

    def score(checkpoint: Checkpoint) -> Score:
        return score_checkpoint(checkpoint, held_out, blind=False, ctx=ctx)

    whole = score(Checkpoint.load(path))
    rows = [_quality_row("none", 1.0, whole, whole)]
    print_quality(rows)
    for name in options.schedules:
        for steps in (0, *options.distill):
            checkpoint = stage_of(name).apply(Checkpoint.load(path), calibration, ctx)
            share = checkpoint.history[-1].metrics["mean_kept_share"]
            if steps:
                checkpoint = Distill(steps=steps).apply(checkpoint, calibration, ctx)
            label = f"{name} distilled {steps}" if steps else name
            rows.append(_quality_row(label, share, score(checkpoint), whole))
            print_quality(rows[-1:])
        fewer = ReduceTokens(keep=share, reducer=UniformStride())
        reduced = fewer.apply(Checkpoint.load(path), calibration, ctx)
        rows.append(_quality_row("  as many, uniform_stride", share, score(reduced), whole))
        print_quality(rows[-1:])
    return rows


def _quality_row(schedule: str, share: float, score: Score, whole: Score) -> dict[str, Any]:
    return {
        "schedule": schedule,
        "mean_kept_share": share,
        "n": score.n,
        "accuracy": score.accuracy,
        "interval": [score.interval_low, score.interval_high],
        "difference": asdict(compare_scores(whole, score)),
    }


def print_quality(rows: list[dict[str, Any]]) -> None:
    """One line per row."""
    for row in rows:
        found = row["difference"]
        change, low, high = (
            100 * found[key] for key in ("difference", "interval_low", "interval_high")
        )
        print(
            f"{row['mean_kept_share']:>6.2f}  {row['accuracy']:.1%}  "
            f"{change:+.1f} [{low:+.1f}, {high:+.1f}]  {row['schedule']}",
            flush=True,
        )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, help="folder for models and bundles")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--quality", help="a reference model")
    parser.add_argument("--schedules", nargs="+", help="as recipes give them")
    parser.add_argument("--shape", default="smolvlm-256m")
    parser.add_argument("--recipes", nargs="+", default=["float", "int4-balanced"])
    parser.add_argument("--visual", type=int, default=64, help="visual rows of the prompt")
    parser.add_argument("--text", type=int, default=32, help="rows of text around them")
    parser.add_argument("--steps", type=int, default=16, help="tokens that are generated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n", type=int, default=500, help="held-out questions")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--distill", type=int, nargs="*", default=[], help="steps; none without")
    options = parser.parse_args()
    given = options.schedules
    if options.speed:
        if options.work is None:
            parser.error("--speed needs --work")
        options.schedules = given or list(_SPEED_SCHEDULES)
        speed = measure_speed(options)
        print_speed(speed)
        print(json.dumps({"benchmark": "visual_schedule_speed", "rows": speed}))
    if options.quality:
        options.schedules = given or list(_QUALITY_SCHEDULES)
        rows = measure_quality(options)
        print(json.dumps({"benchmark": "visual_schedule_quality", "rows": rows}))


if __name__ == "__main__":
    main()
