"""What fewer tokens of a cut picture cost, by where they are saved: in every tile, or in some.

    python benchmarks/tile_tokens.py --n 960
    python benchmarks/tile_tokens.py --n 960 --reducer distinct_features --budgets

`pocket-tiles` answers the same held-out questions about mosaics with the float model in torch, so
that differences are paired. Arms are lists of stages; `tokens` is the share of the visual rows that
enter the decoder, all questions together, and `tiles` the share of the runs of the tower. With
`--budgets` tiles of one picture have different numbers of tokens, at the same number in all: the
whole picture half of them (as HiRED does) or as many as a tile, and its tiles as many each, or by
what they show. With `--seconds N` a bundle of each arm answers one question after another,
interleaved, for the medians of preprocessing, tower and time to first token. Prints a table and one
JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from pocketvlm.bundle import Bundle
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens import REDUCERS, ReduceTokens
from pocketvlm.compress.tokens.limit_tiles import LimitTiles
from pocketvlm.compress.tokens.skip_empty_tiles import SkipEmptyTiles
from pocketvlm.compress.tokens.tile_budgets.detail import Detail
from pocketvlm.compress.tokens.tile_budgets.hired import Hired
from pocketvlm.compress.tokens.tile_budgets.whole_finer import WholeFiner
from pocketvlm.context import RunContext
from pocketvlm.evaluation.score import compare_scores, score_checkpoint
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.machine import describe_processor
from pocketvlm.models.spec import ModelSpec
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.reference import REFERENCE_MODELS, reference_model_path
from pocketvlm.reference_graph.tile_budget import encode_tiles
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.stages import Stage

_MODEL = "pocket-tiles"
_CONTEXT = RunContext(threads=1)


def arms(kinds: Sequence[str], shares: Sequence[float]) -> Iterator[tuple[str, list[Stage]]]:
    """Names of arms and their stages, all tokens first."""
    yield "all tokens", []
    yield "whole picture alone", [LimitTiles(max_tiles=1)]
    yield "skip_empty_tiles", [SkipEmptyTiles()]
    for kind in kinds:
        reducer: Any = REDUCERS[kind]()
        for share in shares:
            yield f"{kind} {share}", [ReduceTokens(reducer=reducer, keep=share)]
    for kind in kinds:
        reducer = REDUCERS[kind]()
        for share in shares:
            stages = [SkipEmptyTiles(), ReduceTokens(reducer=reducer, keep=share)]
            yield f"skip_empty_tiles, {kind} {share}", stages


def budget_arms(
    kinds: Sequence[str], shares: Sequence[float], spec: ModelSpec, tiles: float
) -> Iterator[tuple[str, list[Stage]]]:
    """The same with a number of tokens for every tile.

    Args:
        kinds: Reducers.
        shares: Of all tokens, how many are kept.
        spec: The model.
        tiles: Tiles of a picture beside the whole, on average.
    """
    full = spec.visual_tokens
    for kind in kinds:
        reducer: Any = REDUCERS[kind]()
        for share in shares:
            even = max(1, round(share * full))
            half = min(full - 1, round((1 + tiles) * even / 2))
            rest = max(1, round(((1 + tiles) * even - half) / tiles))
            budgets: dict[str, WholeFiner | Detail | Hired] = {
                "whole_finer": WholeFiner(whole=half, tile=rest),
                "detail": Detail(whole=even, tile=even),
                "detail, whole half": Detail(whole=half, tile=rest),
            }
            if reducer.looks_at_pictures:
                budgets["hired"] = Hired(whole=even, tile=even)
                budgets["hired, whole half"] = Hired(whole=half, tile=rest)
            for name, budget in budgets.items():
                wanted = [budget.tile * factor for factor in (1, 0.25, 0.5, 1.5, 2, 3)]
                counts = [max(1, min(round(count), full - 1)) for count in (*wanted, budget.whole)]
                stage = ReduceTokens(
                    reducer=reducer, keep=tuple(dict.fromkeys(counts)), tile_budget=budget
                )
                yield f"{kind} {share}, {name}", [stage]


def count(checkpoint: Checkpoint, samples: CalibrationSet) -> tuple[int, int]:
    """Visual rows and tiles of all questions."""
    rows = tiles = 0
    full, processor = checkpoint.spec.visual_tokens, checkpoint.processor
    for sample in samples:
        grids = sample.grids(processor)
        tiles += sum(grid.tiles for grid in grids)
        if checkpoint.tile_budget is None:
            rows += sum(grid.most_rows(full, checkpoint.visual_tokens) for grid in grids)
            continue
        with torch.inference_mode():
            pixels = processor.pixels([sample.open_image()], grids)
            (seen,) = encode_tiles(checkpoint, pixels, grids)
        rows += sum(tile.indices.shape[1] for tile in seen)
    return rows, tiles


def time_bundles(
    checkpoints: dict[str, Checkpoint], samples: CalibrationSet, seconds: float
) -> dict[str, dict[str, float]]:
    """Medians in milliseconds by arm: every bundle answers a question before the next is asked."""
    laps: dict[str, list[tuple[float, float, float]]] = {name: [] for name in checkpoints}
    with tempfile.TemporaryDirectory() as folder:
        talks = {}
        for number, (name, checkpoint) in enumerate(checkpoints.items()):
            path = Path(folder) / str(number)
            path.mkdir()
            write_graphs(checkpoint, (ToOnnx(),), path, "", _CONTEXT)
            talks[name] = Conversation(Bundle.open(path))
            talks[name].ask(samples.samples[0].question, samples.samples[0].open_image())
        end = perf_counter() + seconds
        for sample in samples:
            for name, talk in talks.items():
                talk.reset()
                times = talk.ask(sample.question, sample.open_image(), max_new_tokens=1).timings
                first = times.preprocess_ms + times.vision_ms + times.tokenize_ms
                laps[name].append((times.preprocess_ms, times.vision_ms, first + times.prefill_ms))
            if perf_counter() > end:
                break
    names = ("preprocess_ms", "vision_ms", "ttft_user_ms")
    return {
        name: dict(zip(names, map(median, zip(*own, strict=True)), strict=True))
        for name, own in laps.items()
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reducer", action="append", choices=REDUCERS)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.6, 0.4, 0.2, 0.1])
    parser.add_argument("--n", type=int, default=960)
    parser.add_argument("--budgets", action="store_true", help="Tiles with different numbers.")
    parser.add_argument("--only", nargs="+", help="Names of arms beside all tokens.")
    parser.add_argument("--seed", type=int, default=1, help="Seed of the held-out questions.")
    parser.add_argument("--seconds", type=float, default=0.0, help="Time for bundles to answer.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    samples = CalibrationSet.from_reference(
        arguments.seed, arguments.n, split="evaluation", pictures=REFERENCE_MODELS[_MODEL]
    )
    calibration = CalibrationSet.synthetic(1)
    kinds = arguments.reducer or ["distinct_features", "average_pool", "uniform_stride"]
    start = Checkpoint.load(reference_model_path(_MODEL))
    rows: list[dict[str, Any]] = []
    baseline, checkpoints = None, dict[str, Checkpoint]()
    chosen = [*arms(kinds, arguments.keep)]
    if arguments.budgets:
        sizes = [grid for sample in samples for grid in sample.grids(start.processor)]
        mean = sum(len(grid.parts) for grid in sizes) / len(sizes)
        chosen += budget_arms(kinds, arguments.keep, start.spec, mean)
    if arguments.only:
        chosen = [arm for arm in chosen if arm[0] in ("all tokens", *arguments.only)]
    for name, stages in chosen:
        checkpoint = Checkpoint.load(reference_model_path(_MODEL))
        for stage in stages:
            checkpoint = stage.apply(checkpoint, calibration, _CONTEXT)
        checkpoints[name] = checkpoint
        score = score_checkpoint(checkpoint, samples, blind=baseline is None)
        if baseline is None:
            baseline, all_rows, all_tiles = score, *count(checkpoint, samples)
            print(f"{_MODEL}: {score.accuracy:.1%}, blind {score.blind:.1%}, n={score.n}")
            print("  {:<44}{:>7}{:>7}{:>10}  {}".format("", "tokens", "tiles", "kept", "points"))
        found = compare_scores(baseline, score)
        own_rows, own_tiles = count(checkpoint, samples)
        row = {
            "arm": name,
            "tokens": own_rows / all_rows,
            "tiles": own_tiles / all_tiles,
            "accuracy": score.accuracy,
            "kept": score.accuracy / baseline.accuracy,
            "difference": found.difference,
            "interval": [found.interval_low, found.interval_high],
            "per_kind": {kind: each.accuracy for kind, each in score.per_kind.items()},
        }
        rows.append(row)
        print(
            f"  {name:<44}{row['tokens']:>7.1%}{row['tiles']:>7.1%}{row['kept']:>10.1%}  "
            f"{100 * found.difference:+.1f} [{100 * found.interval_low:+.1f}, "
            f"{100 * found.interval_high:+.1f}]",
            flush=True,
        )
    times = time_bundles(checkpoints, samples, arguments.seconds) if arguments.seconds else {}
    for name, own in times.items():
        print(f"  {name:<44}" + "".join(f"{key} {value:.1f}  " for key, value in own.items()))
    document = {"n": arguments.n, "seed": arguments.seed, "rows": rows, "times": times}
    print(json.dumps({**document, "machine": describe_processor()}))


if __name__ == "__main__":
    main()
