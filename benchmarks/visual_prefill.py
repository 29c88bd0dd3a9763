"""A quarter of the visual tokens before the decoder, and a schedule inside it of the same cost.

    python benchmarks/visual_prefill.py --work shapes --threads 1 --clock cpu

The tower and the processor of LLaVA-1.5, whose 576 tokens all enter a decoder of 0.5 billion
weights, at random weights: all tokens, `reduce_tokens` to a share of them, and `fast_v` after two
layers with as many tokens as cost the same multiplications of prefill. The host is calibrated, the
bundles answer in turns, and `plan` predicts the same. Prints the table with the load of the
machine, and one JSON line; exits with 1 where prefill is not 2.5 times faster or a predicted time
to the first token is off by more than 15 %. `--clock` is that of predicted_times.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from bisect import bisect_right
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median

from answer_clock import add_clock, set_clock
from predicted_times import answers, of
from shape_bundles import bundle_of

from pocketvlm.bundle import VisualSchedule
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.rank.cls_attention import ClsAttention
from pocketvlm.compress.tokens.schedule.fast_v import FastV
from pocketvlm.compress.tokens.schedule.prefill_macs import PrefillMacs
from pocketvlm.compress.tokens.schedule.stage import DropTokens
from pocketvlm.compress.tokens.stage import ReduceTokens
from pocketvlm.device_bench.block import AnswerTimes
from pocketvlm.device_bench.prediction.calibration.host import calibrate_host
from pocketvlm.device_bench.prediction.rates import Rates
from pocketvlm.device_bench.prediction.roofline import Times, predict_times
from pocketvlm.device_bench.workload import Workload
from pocketvlm.models.spec import ModelSpec
from pocketvlm.pipeline.plan import plan_stages
from pocketvlm.pipeline.predict import model_work, question_of
from pocketvlm.recipes.load import load_recipe
from pocketvlm.reference.random_models import write_shape
from pocketvlm.reference.shapes import Shape, load_shape
from pocketvlm.stages import Stage

_FIGURES = ("vision_ms", "prefill_ms", "ttft_user_ms")
_FASTER = 2.5
_BOUND = 0.15
_SIDE = 512  # of the picture in predicted_times.py
_NEW = 24  # tokens that it generates


def shape() -> Shape:
    """LLaVA-1.5 with another model's decoder."""
    tower, decoder = load_shape("llava-1.5-7b"), load_shape("llava-interleave-0.5b")
    taken = ("text_config", "image_token_index", "tie_word_embeddings")
    config = {**tower.config, **{key: decoder.config[key] for key in taken}}
    return replace(tower, name="llava-1.5-0.5b", config=config)


def methods(spec: ModelSpec, share: float, text_rows: int) -> dict[str, tuple[Stage, ...]]:
    """The stages of each row, by its label."""
    reduce = ReduceTokens(reducer=ClsAttention(), keep=share)
    (kept,) = reduce.resolved_keeps(spec)
    budget = PrefillMacs.of(spec, [(text_rows, kept)]).mean(None)
    macs = PrefillMacs.of(spec, [(text_rows, spec.visual_tokens)])

    def scheduled(keep: int) -> VisualSchedule:
        return FastV(keep=keep).plan(spec.decoder.depth, spec.visual_tokens)

    keep = bisect_right(
        range(1, spec.visual_tokens), budget, key=lambda keep: macs.mean(scheduled(keep))
    )
    if not keep:
        raise SystemExit(f"no fast_v after two layers costs as little as {kept} tokens in all")
    return {
        "all tokens": (),
        f"reduce_tokens, {kept} before the decoder": (reduce,),
        f"fast_v, {keep} after two layers": (DropTokens(schedule=FastV(keep=keep)),),
    }


def made(model: Path, stages: tuple[Stage, ...]) -> Checkpoint:
    """The float checkpoint with a reducer or a schedule, which need no samples."""
    checkpoint = Checkpoint.load(model)
    spec = checkpoint.spec
    for stage in stages:
        if isinstance(stage, ReduceTokens):
            checkpoint = replace(checkpoint, reducer=stage.build(spec))
        elif isinstance(stage, DropTokens):
            schedule = stage.schedule.plan(spec.decoder.depth, spec.visual_tokens)
            checkpoint = replace(checkpoint, visual_schedule=schedule)
    return checkpoint


def predicted(
    spec: ModelSpec, stages: tuple[Stage, ...], recipe: str, text_rows: int, rates: Rates
) -> Times:
    """What `plan` predicts of a bundle on the grids of the recipe's quantizer."""
    loaded = load_recipe(recipe)
    grids = tuple(stage for stage in loaded.stages if hasattr(stage, "rules"))
    state = plan_stages((*stages, *grids), spec, loaded.targets)
    model = model_work(state, loaded.targets)
    if isinstance(model, str):
        raise SystemExit(model)
    asked = Workload(name="asked", prompt_tokens=text_rows, new_tokens=_NEW, image_size=_SIDE)
    return predict_times(model, question_of(state, asked), rates)


def main() -> None:
    """Calibrates, measures, predicts, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and bundles")
    parser.add_argument("--recipe", default="int4-balanced")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    add_clock(parser)
    options = parser.parse_args()
    set_clock(parser, options)
    of_shape = shape()
    spec = of_shape.spec
    model = write_shape(of_shape, options.work / of_shape.name)

    def bundle(number: int, stages: tuple[Stage, ...]) -> Path:
        folder = options.work / f"{of_shape.name}-{options.recipe}-{number}"
        return bundle_of(lambda: made(model, stages), options.recipe, folder).path

    first = answers(bundle(0, ()), options.threads).answers[0]
    text_rows = first.prompt_tokens - spec.visual_tokens
    rows = methods(spec, options.keep, text_rows)
    bundles = {label: bundle(number, stages) for number, (label, stages) in enumerate(rows.items())}
    calibration = calibrate_host(options.threads)
    print(
        f"{calibration.processor}, {options.threads} threads, clock {options.clock}, "
        f"{options.recipe}; {text_rows} rows of text; calibrated at a load of "
        f"{calibration.load_average_1m}"
    )
    taken: dict[str, list[AnswerTimes]] = defaultdict(list)
    loads: list[float] = []
    for _ in range(options.rounds):
        for label, path in bundles.items():
            taken[label] += answers(path, options.threads).answers
            loads.append(round(os.getloadavg()[0], 1))
    print(f"load while bundles were timed: {min(loads)} to {max(loads)}\n")
    print(f"{'':<40}{'figure':<14}{'measured':>10}{'of all':>8}{'predicted':>11}{'ratio':>7}")
    whole, table = taken["all tokens"], []
    for label, stages in rows.items():
        times = predicted(spec, stages, options.recipe, text_rows, calibration.rates)
        for figure in _FIGURES:
            measured = [of(answer, figure) for answer in taken[label]]
            pairs = zip(measured, (of(answer, figure) for answer in whole), strict=True)
            share = median(ours / theirs for ours, theirs in pairs)
            guess = getattr(times, figure) / median(measured)
            table.append([label, figure, measured, share, guess])
            print(
                f"{label:<40}{figure:<14}{median(measured):>10.1f}{share:>8.2f}"
                f"{getattr(times, figure):>11.1f}{guess:>7.2f}"
            )
    shares = {label: share for label, figure, _, share, _ in table if figure == "prefill_ms"}
    worst = max(abs(guess - 1) for _, figure, _, _, guess in table if figure == "ttft_user_ms")
    reduced = list(shares.values())[1]
    print(f"\nprefill {1 / reduced:.2f} times faster; ttft_user_ms predicted within {worst:.0%}")
    print(json.dumps({"benchmark": "visual_prefill", "rows": table, "loads": loads}))
    sys.exit(1 / reduced < _FASTER or worst > _BOUND)


if __name__ == "__main__":
    main()
