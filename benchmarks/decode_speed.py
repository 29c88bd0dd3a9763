"""Prefill and decoding of the int4 bundle beside float32 ONNX, and beside other runtimes.

    python benchmarks/decode_speed.py --work shapes [--genai VENV/bin/python]
        [--openvino VENV/bin/python]

All of them take turns in one run, with the same prompt length and thread count, on random weights
at a published shape. Ours answers through `runtime.OnnxRunner`, embedding look-up and argmax
included, once with the decoder alone and once with the graph for long calls. `--genai` names the
interpreter of an environment with onnxruntime-genai, torch and transformers, whose own model
builder exports the same text decoder to int4; `--openvino` one for `openvino_worker.py`. Prints a
table, and one JSON line with every raw sample. `--clock cpu --threads 1` is for machines that do
other work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from answer_clock import add_clock, set_clock
from peer_process import started_peer
from shape_bundles import write_bundle

from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.machine import describe_environment
from pocketvlm.runtime.onnx.runner import OnnxRunner

_SHAPE = "smolvlm-256m"
_BAR = 3.0
# The recipe of an arm's bundle, and from how many rows its graph for long calls runs.
_ARMS: dict[str, tuple[str, int | None]] = {
    "float32 ONNX": ("float", None),
    "int4 ONNX": ("int4-balanced", None),
    "int4 ONNX, int8 rows": ("int4-balanced", 2),
}

Round = Callable[[int, int], dict[str, Any]]


def onnx_round(runner: OnnxRunner, prompt: int, new: int) -> dict[str, Any]:
    """One prefill and `new` greedy tokens: milliseconds of each."""
    ids = np.random.default_rng(0).integers(10, 40_000, prompt).tolist()
    runner.reset()
    start = time.perf_counter()
    logits = runner.decode(runner.embed(ids), np.arange(prompt, dtype=np.int64)[None])
    token = int(logits.argmax())
    prefill = time.perf_counter() - start
    steps = []
    for position in range(prompt, prompt + new):
        start = time.perf_counter()
        logits = runner.decode(runner.embed([token]), np.array([[position]], np.int64))
        token = int(logits.argmax())
        steps.append((time.perf_counter() - start) * 1e3)
    return {"prefill_ms": prefill * 1e3, "step_ms": steps}


def main() -> None:
    """Writes the models, lets everybody run in turns, prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and bundles")
    parser.add_argument("--genai", type=Path, help="interpreter for genai_worker.py")
    parser.add_argument("--openvino", type=Path, help="interpreter for openvino_worker.py")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=96)
    parser.add_argument("--new", type=int, default=64)
    add_clock(parser)
    options = parser.parse_args()
    set_clock(parser, options)

    rounds: dict[str, Round] = {}
    for name, (recipe, least_rows) in _ARMS.items():
        target = ToOnnx(int8_prefill_rows=least_rows)
        label = recipe if least_rows is None else f"prefill-{recipe}-{least_rows}"
        runner = OnnxRunner(
            write_bundle(_SHAPE, recipe, options.work / label, target),
            threads=options.threads,
            capacity=options.prompt + options.new + 1,
            keep_vision=0,
        )
        rounds[name] = partial(onnx_round, runner)
    with ExitStack() as stack:
        for name, script, python in (
            ("ORT-GenAI int4", "genai_worker.py", options.genai),
            ("OpenVINO int4", "openvino_worker.py", options.openvino),
        ):
            if python is not None:
                peer = stack.enter_context(
                    started_peer(
                        python,
                        script,
                        options.work / _SHAPE,
                        threads=options.threads,
                        clock=options.clock,
                    )
                )
                rounds[name] = partial(peer.ask, "answer")
        samples: dict[str, list[dict[str, Any]]] = {name: [] for name in rounds}
        for index in range(options.rounds + 1):
            for name, run in rounds.items():
                sample = run(options.prompt, options.new)
                if index:  # the first round warms up
                    samples[name].append(sample)
    report(samples, options)


def report(samples: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Prints the table and the JSON line."""
    # A median a round, so that a ratio compares what ran side by side.
    prefill = {name: [each["prefill_ms"] for each in taken] for name, taken in samples.items()}
    speed = {
        name: [1e3 / statistics.median(each["step_ms"]) for each in taken]
        for name, taken in samples.items()
    }
    print(f"{_SHAPE}, {options.threads} threads, {options.rounds} rounds, {options.clock} clock\n")
    print(f"{'':24s} {f'prefill of {options.prompt}':>15s} {'of float32':>10s} {'tokens/s':>9s}")
    ratios: dict[str, list[float]] = {}
    for name in samples:
        share = statistics.median(_pairs(prefill[name], prefill["float32 ONNX"]))
        ratios[name] = _pairs(speed["int4 ONNX"], speed[name])
        print(
            f"{name:24s} {statistics.median(prefill[name]):12.1f} ms {share:10.2f} "
            f"{statistics.median(speed[name]):9.1f}; int4 ONNX is "
            f"{statistics.median(ratios[name]):.2f} times as fast a token "
            f"({min(ratios[name]):.2f} to {max(ratios[name]):.2f})"
        )
    reached = statistics.median(ratios["float32 ONNX"]) >= _BAR
    print(f"\nat least {_BAR} times float32: {'yes' if reached else 'NO'}")
    document = {
        "shape": _SHAPE,
        "environment": describe_environment(options.threads),
        "clock": options.clock,
        "prompt": options.prompt,
        "samples": samples,
        "ratios": ratios,
    }
    print(json.dumps(document))


def _pairs(mine: list[float], theirs: list[float]) -> list[float]:
    return [a / b for a, b in zip(mine, theirs, strict=True)]


if __name__ == "__main__":
    main()
