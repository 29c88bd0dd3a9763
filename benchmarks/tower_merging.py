"""The vision graph with tokens merged inside the tower, beside the whole one.

    python benchmarks/tower_merging.py --work shapes
    python benchmarks/tower_merging.py --work shapes --recipes int8-safe --rounds 9

Random weights at a published shape with one decoder block, since the vision graph alone is timed.
Weights are float32, or rounded to the grids of a recipe. All graphs take turns in one run, on one
thread, and ratios are taken round by round; beside wall time stands the processor time of the same
run, which tells the same on a busy machine.
Prints a table, and one JSON line with every raw sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from shape_bundles import bundle_of

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.tower.mergers import MergeImportant, MergeNeighbours, MergeSimilar
from pocketvlm.compress.tokens.tower.stage import MergeTokens
from pocketvlm.context import RunContext
from pocketvlm.reference.random_models import write_shape
from pocketvlm.reference.shapes import Shape, load_shape
from pocketvlm.runtime.onnx.engine import onnxruntime

_STAGES: Mapping[str, MergeTokens | None] = {
    "whole": None,
    "similar-1": MergeTokens(merger=MergeSimilar(), first_block=1, blocks=1),
    "similar-0to1": MergeTokens(merger=MergeSimilar()),
    "important-1": MergeTokens(merger=MergeImportant(), first_block=1, blocks=1),
    "neighbours-1": MergeTokens(merger=MergeNeighbours(), first_block=1, blocks=1),
    "neighbours-3": MergeTokens(merger=MergeNeighbours(), first_block=3, blocks=1),
    "neighbours-3-quarter": MergeTokens(
        merger=MergeNeighbours(), first_block=3, blocks=1, keep=0.25
    ),
}


def _shape(name: str) -> Shape:
    """A shape with one block of its decoder."""
    shape = load_shape(name)
    text = {**shape.config["text_config"], "num_hidden_layers": 1}
    return replace(shape, config={**shape.config, "text_config": text})


def _model(shape: Shape, work: Path, stage: MergeTokens | None) -> Checkpoint:
    checkpoint = Checkpoint.load(write_shape(shape, work / f"{shape.name}-1", is_split=False))
    if stage is None:
        return checkpoint
    return stage.apply(checkpoint, CalibrationSet.from_reference(0, 1), RunContext(threads=1))


def _runner(graph: Path, height: int, width: int) -> Callable[[], tuple[float, float]]:
    """Seconds of one picture: by the clock, and of the processor."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).normal(size=(1, 3, height, width)).astype(np.float32)

    def run() -> tuple[float, float]:
        begun, busy = time.perf_counter(), time.process_time()
        session.run(None, {"pixel_values": pixels})
        return time.perf_counter() - begun, time.process_time() - busy

    return run


def main() -> None:
    """Runs all graphs in turns."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of models and bundles")
    parser.add_argument("--shape", default="smolvlm-256m", help="name of a shape")
    parser.add_argument("--recipes", nargs="+", default=["float"], help="grids of these recipes")
    parser.add_argument("--variants", nargs="+", choices=_STAGES, default=list(_STAGES))
    parser.add_argument("--rounds", type=int, default=5, help="pictures of each graph")
    asked = parser.parse_args()
    shape = _shape(asked.shape)
    tower = shape.spec.tower
    raw = {}
    for recipe in asked.recipes:
        runners = {}
        for variant in asked.variants:
            bundle = bundle_of(
                partial(_model, shape, asked.work, _STAGES[variant]),
                recipe,
                asked.work / f"{shape.name}-1-{recipe}-{variant}",
            )
            graph = bundle.file(bundle.component("onnx", "vision").file)
            runners[variant] = _runner(graph, tower.height, tower.width)
            runners[variant]()
        samples: dict[str, list[tuple[float, float]]] = {variant: [] for variant in runners}
        for _ in range(asked.rounds):
            for variant, run in runners.items():
                samples[variant].append(run())
        first = samples[asked.variants[0]]
        print(f"{shape.name}, {recipe}: {'variant':<22} ms (wall)  ms (processor)  times faster")
        for variant, found in samples.items():
            wall, busy = (statistics.median(each) * 1e3 for each in zip(*found, strict=True))
            ratios = [mine[1] / other[1] for mine, other in zip(first, found, strict=True)]
            print(
                f"  {variant:<22} {wall:10.0f} {busy:12.0f} {statistics.median(ratios):12.2f} "
                f"[{min(ratios):.2f}, {max(ratios):.2f}]"
            )
        raw[recipe] = samples
    print(json.dumps({"shape": shape.name, "seconds": raw}))


if __name__ == "__main__":
    main()
