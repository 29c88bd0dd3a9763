"""Decoding speed of the int4 bundle beside float32 ONNX and, if there is one, ORT-GenAI.

    python benchmarks/decode_speed.py --work shapes [--genai VENV/bin/python]

All of them take turns in one run, with the same prompt length and thread count, on random weights
at a published shape. Ours answers through `runtime.OnnxRunner`, embedding look-up and argmax
included. `--genai` names the interpreter of an environment with onnxruntime-genai, torch and
transformers; its own model builder exports the same text decoder to int4. Prints a table, and one
JSON line with every raw sample at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from shape_bundles import write_bundle

from pocketvlm.runtime.onnx.runner import OnnxRunner

_SHAPE = "smolvlm-256m"
_BAR = 3.0

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


def start_genai(python: Path, model: Path, threads: int) -> tuple[subprocess.Popen[str], Round]:
    """Starts ORT-GenAI in its own environment; it exports the model on its first start."""
    worker = Path(__file__).with_name("genai_worker.py")
    process = subprocess.Popen(
        [str(python), str(worker), str(model), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    asks, answers = process.stdin, process.stdout
    if asks is None or answers is None or answers.readline().strip() != "ready":
        raise SystemExit(f"{python}: ORT-GenAI did not start; its own words are above")

    def run(prompt: int, new: int) -> dict[str, Any]:
        asks.write(f"{prompt} {new}\n")
        asks.flush()
        return json.loads(answers.readline())

    return process, run


def main() -> None:
    """Writes the models, lets everybody run in turns, prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and bundles")
    parser.add_argument("--genai", type=Path, help="interpreter with onnxruntime-genai")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=96)
    parser.add_argument("--new", type=int, default=64)
    options = parser.parse_args()

    rounds: dict[str, Round] = {}
    for name, recipe in (("float32 ONNX", "float"), ("int4 ONNX", "int4-balanced")):
        bundle = write_bundle(_SHAPE, recipe, options.work / recipe)
        runner = OnnxRunner(bundle, threads=options.threads, capacity=512, keep_vision=False)
        rounds[name] = partial(onnx_round, runner)
    process = None
    if options.genai:
        process, rounds["ORT-GenAI int4"] = start_genai(
            options.genai, options.work / _SHAPE, options.threads
        )
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in rounds}
    for index in range(options.rounds + 1):
        for name, run in rounds.items():
            sample = run(options.prompt, options.new)
            if index:  # the first round warms up
                samples[name].append(sample)
    if process is not None:
        process.terminate()
    report(samples, options.threads)


def report(samples: dict[str, list[dict[str, Any]]], threads: int) -> None:
    """Prints the table and the JSON line."""
    rows = {}
    for name, taken in samples.items():
        prefill = statistics.median(sample["prefill_ms"] for sample in taken)
        # A median a round, so that a ratio compares what ran side by side.
        speeds = [1e3 / statistics.median(sample["step_ms"]) for sample in taken]
        rows[name] = {"prefill_ms": prefill, "decode_tok_s": statistics.median(speeds)}
        rows[name]["decode_tok_s_by_round"] = speeds
    mine = rows["int4 ONNX"]["decode_tok_s_by_round"]
    print(f"{_SHAPE}, {threads} threads, {len(mine)} rounds\n")
    print(f"{'':16s} {'prefill ms':>10s} {'tokens/s':>9s}  int4 ONNX is (a round)")
    ratios = {}
    for name, row in rows.items():
        others = row["decode_tok_s_by_round"]
        ratios[name] = [ours / theirs for ours, theirs in zip(mine, others, strict=True)]
        spread = f"{min(ratios[name]):.2f} to {max(ratios[name]):.2f}"
        median = statistics.median(ratios[name])
        print(
            f"{name:16s} {row['prefill_ms']:10.1f} {row['decode_tok_s']:9.1f}  "
            f"{median:.2f} times as fast ({spread})"
        )
    reached = statistics.median(ratios["float32 ONNX"]) >= _BAR
    print(f"\nat least {_BAR} times float32: {'yes' if reached else 'NO'}")
    document = {"shape": _SHAPE, "threads": threads, "samples": samples, "ratios": ratios}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
