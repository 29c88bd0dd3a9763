"""What it saves, and costs, that visual tokens run through the first decoder layers only.

    python benchmarks/skip_visual.py --work shapes --speed
    python benchmarks/skip_visual.py --quality reference:pocket-llava

`--speed`: prefill and one step of decoding of ONNX bundles of a published shape with random
weights, all of them in turns in one process, and the bytes of KV cache that a prompt leaves.
`--quality`: accuracy of a reference model on held-out questions by where visual tokens end, with
what the calibration samples had said of each layer; `--distill N` adds rows with N steps of
distillation after the cut. Prints tables, and one JSON line with every raw sample at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from shape_bundles import bundle_of

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.gradients.visual_use import measure_visual_use
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.distillation.stage import Distill
from pocketvlm.compress.pruning.visual_cutoff import SkipVisual
from pocketvlm.context import RunContext
from pocketvlm.evaluation.score import Score, compare_scores, score_checkpoint
from pocketvlm.pipeline.sources import resolve_model
from pocketvlm.reference.random_models import write_shape
from pocketvlm.reference.shapes import load_shape
from pocketvlm.runtime.onnx.runner import OnnxRunner

_SHAPE = "smolvlm-256m"


def measure_speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prefill and decoding of bundles that differ in where visual rows end, in turns."""
    runners: dict[tuple[str, str], OnnxRunner] = {}
    model = write_shape(load_shape(_SHAPE), options.work / _SHAPE, is_split=False)
    depth = Checkpoint.load(model).spec.decoder.depth
    for recipe in options.recipes:
        for layers in (None, *options.layers):

            def make(layers: int | None = layers) -> Checkpoint:
                return replace(Checkpoint.load(model), visual_layers=layers)

            name = "all" if layers is None else f"{layers}"
            folder = options.work / f"{_SHAPE}-{recipe}-visual-{name}"
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
            "visual_layers": depth if name == "all" else int(name),
            "visual_rows": options.visual,
            "text_rows": options.text,
            "kv_bytes": held[recipe, name],
            **samples[recipe, name],
        }
        for recipe, name in runners
    ]


def print_speed(rows: list[dict[str, Any]]) -> None:
    """Medians, and what each row saves beside the one that keeps visual rows in all layers."""
    print(f"{'recipe':<14} {'layers':>6} {'prefill ms':>11} {'':>6} {'step ms':>8} {'KV MB':>7}")
    for row in rows:
        whole = next(
            other
            for other in rows
            if other["recipe"] == row["recipe"]
            and other["visual_layers"] == max(r["visual_layers"] for r in rows)
        )
        ratios = [a / b for a, b in zip(row["prefill_ms"], whole["prefill_ms"], strict=True)]
        print(
            f"{row['recipe']:<14} {row['visual_layers']:>6} "
            f"{statistics.median(row['prefill_ms']):>11.1f} {statistics.median(ratios):>6.2f} "
            f"{statistics.median(row['step_ms']):>8.2f} {row['kv_bytes'] / 1e6:>7.2f}"
        )


def measure_quality(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy by where visual tokens end, in pairs with the model that keeps them."""
    path = resolve_model(options.quality)
    held_out = list(CalibrationSet.from_reference(1, options.n, split="evaluation"))
    calibration = CalibrationSet.from_reference(options.seed, options.samples)
    ctx = RunContext(threads=options.threads, seed=options.seed, source_dir=path)
    uses = measure_visual_use(Checkpoint.load(path), calibration)
    whole = score_checkpoint(Checkpoint.load(path), held_out, blind=False, ctx=ctx)
    rows = [_quality_row(len(uses), 0, whole, whole)]
    print_quality(rows)
    for layers in options.layers:
        for steps in (0, *options.distill):
            checkpoint = SkipVisual(first_layers=layers).apply(
                Checkpoint.load(path), calibration, ctx
            )
            if steps:
                checkpoint = Distill(steps=steps).apply(checkpoint, calibration, ctx)
            score = score_checkpoint(checkpoint, held_out, blind=False, ctx=ctx)
            use = uses[layers - 1]
            rows.append(
                {
                    **_quality_row(layers, steps, score, whole),
                    "divergence": use.divergence,
                }
            )
            print_quality(rows[-1:])
    for number, use in enumerate(uses):
        ratios = ", ".join(f"{float(ratio):.3f}" for ratio in use.ratios.mean(dim=0))
        ended = "" if use.divergence is None else f"{use.divergence:.4f}"
        print(f"layer {number}: attention ratio by KV group {ratios}; nats if the last {ended}")
    return rows


def _quality_row(layers: int, steps: int, score: Score, whole: Score) -> dict[str, Any]:
    return {
        "visual_layers": layers,
        "distill_steps": steps,
        "n": score.n,
        "accuracy": score.accuracy,
        "interval": [score.interval_low, score.interval_high],
        "difference": asdict(compare_scores(whole, score)),
        "divergence": None,
    }


def print_quality(rows: list[dict[str, Any]]) -> None:
    """One line per row."""
    for row in rows:
        low, high = row["interval"]
        ended = "" if row["divergence"] is None else f"  {row['divergence']:.4f} nats"
        print(
            f"layers {row['visual_layers']:>3}  steps {row['distill_steps']:>4}  "
            f"{row['accuracy']:.1%} [{low:.1%}, {high:.1%}]{ended}",
            flush=True,
        )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, help="folder for models and bundles")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--quality", help="a reference model")
    parser.add_argument("--layers", type=int, nargs="+", help="where visual tokens end")
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
    if options.speed:
        if options.work is None:
            parser.error("--speed needs --work")
        options.layers = options.layers or [8, 15, 23]
        speed = measure_speed(options)
        print_speed(speed)
        print(json.dumps({"benchmark": "skip_visual_speed", "rows": speed}))
    if options.quality:
        depth = Checkpoint.load(resolve_model(options.quality)).spec.decoder.depth
        options.layers = options.layers or list(range(1, depth))
        quality = measure_quality(options)
        print(
            json.dumps(
                {"benchmark": "skip_visual_quality", "model": options.quality, "rows": quality}
            )
        )


if __name__ == "__main__":
    main()
