"""Predicted beside measured on this host: tower, prefill, decode and both times to first token.

    python benchmarks/predicted_times.py --threads 1

Calibrates the host, then times bundles of random weights at published shapes, one after another
and several times over, and holds the medians against what `plan` predicts from the calibration.
Pictures are one tile (`write_bundle`), because 17 take 17 times as long as one. Prints the table
with the load of the machine, and one JSON line with what every probe of the calibration took; exits
with 1 where a prediction is off by more than 25 %.

`--clock cpu` counts the processor time of this process in place of seconds, in calibration and
measurement alike. With one thread it is what the clock on the wall would show on a quiet machine,
and the only way to compare on one that others use.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

from answer_clock import add_clock, set_clock
from shape_bundles import write_bundle

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.block import AnswerTimes, Block
from pocketvlm.device_bench.prediction.calibration.host import calibrate_host
from pocketvlm.device_bench.prediction.rates import Rates
from pocketvlm.device_bench.prediction.roofline import Question, Times, predict_times
from pocketvlm.device_bench.prediction.work import read_work
from pocketvlm.device_bench.protocol import BlockJob, Turn
from pocketvlm.device_bench.runner.measure import measure_block
from pocketvlm.device_bench.workload import draw_picture
from pocketvlm.json_io import encode

_WORK = Path(tempfile.gettempdir()) / "pocketvlm-shapes"
_FIGURES = ("vision_ms", "prefill_ms", "decode_tok_s", "ttft_engine_ms", "ttft_user_ms")
_BOUND = 0.25
_SIDE = 512
_NEW = 24
_TEXT = "Describe what you see in as many details as you can, from the left to the right."


def main() -> None:
    """Calibrates, measures, predicts, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=_WORK)
    parser.add_argument("--shapes", nargs="+", default=["smolvlm-256m", "llava-interleave-0.5b"])
    parser.add_argument("--recipes", nargs="+", default=["float", "int8-safe", "int4-balanced"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    add_clock(parser)
    options = parser.parse_args()
    set_clock(parser, options)
    pairs = [(shape, recipe) for shape in options.shapes for recipe in options.recipes]
    bundles = {
        (shape, recipe): write_bundle(shape, recipe, options.work / f"{shape}-{recipe}").path
        for shape, recipe in pairs
    }
    calibration = calibrate_host(options.threads)
    print(
        f"{calibration.processor}, {options.threads} threads, clock {options.clock}; calibrated in "
        f"{calibration.seconds:.0f} s at a load of {calibration.load_average_1m}"
    )
    samples: dict[tuple[str, str], list[AnswerTimes]] = defaultdict(list)
    loads = []
    for _ in range(options.rounds):
        for pair in pairs:
            samples[pair] += answers(bundles[pair], options.threads).answers
            loads.append(round(os.getloadavg()[0], 1))
    print(f"load while bundles were timed: {min(loads)} to {max(loads)}\n")
    print(f"{'shape':<24}{'recipe':<16}{'figure':<16}{'measured':>10}{'predicted':>11}{'ratio':>7}")
    rows = []
    for pair in pairs:
        taken = samples[pair]
        times = predicted(bundles[pair], taken[0], calibration.rates)
        for figure in _FIGURES:
            measured = median(of(answer, figure) for answer in taken)
            guess = getattr(times, figure)
            rows.append([*pair, figure, measured, guess, guess / measured])
            print(
                f"{pair[0]:<24}{pair[1]:<16}{figure:<16}{measured:>10.1f}{guess:>11.1f}"
                f"{guess / measured:>7.2f}"
            )
    worst = max(abs(row[-1] - 1) for row in rows)
    print(f"\nwithin {_BOUND:.0%}: {'yes' if worst <= _BOUND else 'NO'}, the worst is {worst:.0%}")
    facts = {"rows": rows, "loads": loads, "calibration": encode(calibration)}
    print(json.dumps({"benchmark": "predicted_times", **facts}))
    sys.exit(worst > _BOUND)


def answers(bundle: Path, threads: int) -> Block:
    """One cold answer and two measured ones, in this process."""
    return measure_block(
        BlockJob(
            bundle=str(bundle),
            runtime="onnx",
            turns=(Turn(text=_TEXT, pictures=(0,)),),
            new_tokens=_NEW,
            pictures=(base64.b64encode(draw_picture(_SIDE)).decode(),),
            answers=2,
        ),
        threads,
    )


def predicted(bundle: Path, answer: AnswerTimes, rates: Rates) -> Times:
    """What is predicted from the counts that the bundle holds."""
    opened = Bundle.open(bundle)
    work = read_work(opened)
    if isinstance(work, str) or isinstance(work.model, str):
        raise SystemExit(work if isinstance(work, str) else f"{bundle}: {work.model}")
    visual_rows = opened.manifest.visual_tokens
    question = Question(
        text_rows=answer.prompt_tokens - visual_rows,
        visual_rows=visual_rows,
        tiles_by_vision=(1,),
        picture_pixels=_SIDE**2,
        new_tokens=_NEW,
        cache="int8" if opened.manifest.kv_cache.dtype == "int8" else "float32",
    )
    return predict_times(work.model, question, rates)


def of(answer: AnswerTimes, figure: str) -> float:
    """A figure of an answer."""
    if figure == "decode_tok_s":
        return (answer.new_tokens - 1) / answer.decode_span_ms * 1e3
    return getattr(answer, figure)


if __name__ == "__main__":
    main()
