"""int4 beside float32 in ExecuTorch at a published shape: size, prefill, decode, interleaved.

    python benchmarks/executorch_speed.py --out FOLDER [--shape smolvlm-256m] [--repeats 15]

Weights are random and rounded to nearest, on the grids that `int4-small` names: dense speed does
not depend on values. Both programs are loaded, each in a separate process, and take turns, so
that whatever else the machine does falls on both. Bundles that FOLDER already holds are used again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from pocketvlm.bundle import Bundle
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest
from pocketvlm.compress.tokens.stage import ReduceTokens
from pocketvlm.context import RunContext
from pocketvlm.export.executorch.target import ToExecutorch
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.pipeline.run import compress_checkpoint
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.recipes.load import load_recipe
from pocketvlm.reference.random_models import write_shape
from pocketvlm.reference.shapes import load_shape
from pocketvlm.runtime.executorch.runner import ExecutorchRunner

_PROMPT = 128
_CONTEXT = 1024


def build(shape: str, folder: Path, kind: str) -> tuple[Bundle, int]:
    """A bundle of a shape, and the bytes of its bf16 source."""
    source = folder / shape
    if not source.is_dir():
        write_shape(load_shape(shape), source, is_split=False)
    weights = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    out = folder / f"{shape}-{kind}"
    if not (out / "manifest.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        checkpoint = compress(load_checkpoint(source), kind)
        write_graphs(checkpoint, (ToExecutorch(context=_CONTEXT),), out, "", RunContext())
    return Bundle.open(out, verify=False), weights


def compress(checkpoint: Checkpoint, kind: str) -> Checkpoint:
    """Half of the tokens for both, and the grids of int4-small for one."""
    stages: list[Any] = [ReduceTokens(keep=0.5)]
    if kind == "int4":
        rules = next(
            stage.rules for stage in load_recipe("int4-small").stages if hasattr(stage, "rules")
        )
        stages.append(RoundToNearest(rules=rules))
    return compress_checkpoint(checkpoint, stages, CalibrationSet.synthetic(n=1), RunContext())


def measure(runner: ExecutorchRunner, width: int, repeats: int) -> dict[str, float]:
    """One turn: milliseconds of a picture, of a prompt, and of a token after it."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1, _PROMPT, width)).astype(np.float32)
    runner.reset()
    started = time.perf_counter()
    runner.decode(rows, np.arange(_PROMPT)[None])
    prefill = time.perf_counter() - started
    started = time.perf_counter()
    for step in range(repeats):
        position = np.array([[_PROMPT + step]])
        runner.decode(runner.embed([5]), position)
    decode = (time.perf_counter() - started) / repeats
    return {"prefill_ms": prefill * 1e3, "decode_ms": decode * 1e3}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="smolvlm-256m")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    runners, sizes, width = {}, {}, 0
    for kind in ("float32", "int4"):
        bundle, source = build(arguments.shape, arguments.out, kind)
        runners[kind] = ExecutorchRunner(bundle, threads=arguments.threads)
        sizes[kind] = (bundle.path / "executorch" / "model.pte").stat().st_size / source
        width = int(bundle.component("executorch", "vision").outputs[0].shape[-1])
        width -= 2  # the channels of positions
    samples: dict[str, list[dict[str, float]]] = {kind: [] for kind in runners}
    for turn in range(arguments.repeats + 1):
        for kind, runner in runners.items():
            found = measure(runner, width, repeats=16)
            if turn:  # the first turn warms up
                samples[kind].append(found)
    medians = {
        kind: {name: statistics.median(s[name] for s in found) for name in found[0]}
        for kind, found in samples.items()
    }
    print(f"{arguments.shape}, {arguments.threads} threads, prompt of {_PROMPT} rows")
    print(f"{'':<10} {'of source':>10} {'prefill ms':>11} {'decode ms':>10}")
    for kind, row in medians.items():
        print(
            f"{kind:<10} {sizes[kind]:>10.3f} {row['prefill_ms']:>11.1f} {row['decode_ms']:>10.2f}"
        )
    ratios = {name: medians["float32"][name] / medians["int4"][name] for name in medians["int4"]}
    print(f"{'ratio':<10} {'':>10} {ratios['prefill_ms']:>11.2f} {ratios['decode_ms']:>10.2f}")
    print(json.dumps({"benchmark": "executorch_speed", "sizes": sizes, "samples": samples}))


if __name__ == "__main__":
    main()
