"""What several vision graphs in one bundle cost: bytes, the change from one to another, times.

    python benchmarks/vision_graphs.py --work shapes --shape smolvlm-256m --keep 64 32 16

Makes two bundles of a published shape with random weights: one with the first number of tokens
alone, one with a vision graph for each. Prints the bytes of both, and for every graph of the second
how long loading it, running it and the prefill of its rows take, all in turns in one process. Ends
with one JSON line that holds every raw sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from shape_bundles import bundle_of

from pocketvlm.bundle import Bundle
from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens import ReduceTokens
from pocketvlm.compress.tokens.baseline.uniform_stride import UniformStride
from pocketvlm.context import RunContext
from pocketvlm.machine import describe_processor
from pocketvlm.reference.random_models import write_shape
from pocketvlm.reference.shapes import load_shape
from pocketvlm.runtime.onnx.runner import OnnxRunner


def write_bundle(options: argparse.Namespace, keep: tuple[int, ...]) -> Bundle:
    """The bundle with a vision graph for each number of tokens."""
    model = write_shape(load_shape(options.shape), options.work / options.shape, is_split=False)
    stage = ReduceTokens(reducer=UniformStride(), keep=keep)

    def make() -> Checkpoint:
        return stage.apply(Checkpoint.load(model), CalibrationSet.synthetic(1), RunContext())

    name = "-".join(map(str, keep))
    return bundle_of(
        make, options.recipe, options.work / f"{options.shape}-{options.recipe}-k{name}"
    )


def measure(options: argparse.Namespace, bundle: Bundle) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every graph: the first call, which loads it, the next one, its prefill."""
    samples: dict[str, dict[str, list[float]]] = {}
    runner = OnnxRunner(bundle, threads=options.threads)
    variants = bundle.manifest.variants
    rng = np.random.default_rng(0)
    for _ in range(options.rounds):
        for variant in variants:
            found = samples.setdefault(variant.name, {"load": [], "vision": [], "prefill": []})
            pixels = rng.standard_normal((1, 3, variant.height, variant.width), np.float32)
            times = []
            for _ in range(2):
                start = time.perf_counter()
                embeds, indices = runner.encode_image(pixels, variant.name)
                times.append((time.perf_counter() - start) * 1e3)
            found["load"].append(times[0] - times[1])
            found["vision"].append(times[1])
            text = runner.embed(list(range(5, 5 + options.text))).copy()
            rows = np.concatenate([embeds, text], axis=1)
            runner.reset()
            start = time.perf_counter()
            runner.decode(rows, np.arange(rows.shape[1], dtype=np.int64)[None])
            found["prefill"].append((time.perf_counter() - start) * 1e3)
            del indices
    return samples


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("shapes"))
    parser.add_argument("--shape", default="smolvlm-256m")
    parser.add_argument("--recipe", default="int4-small")
    parser.add_argument("--keep", type=int, nargs="+", default=[64, 32, 16])
    parser.add_argument("--text", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    one = write_bundle(options, tuple(options.keep[:1])).stored_bytes()
    together = write_bundle(options, tuple(options.keep))
    print(f"{describe_processor()}, {options.threads} threads, {options.shape}")
    size = together.stored_bytes()
    print(f"bytes: one graph {one:,}, {len(options.keep)} graphs {size:,}, {size / one:.4f} of it")
    samples = measure(options, together)
    print(f"{'graph':20} {'load_ms':>10} {'vision_ms':>10} {'prefill_ms':>10}")
    for name, found in samples.items():
        medians = (statistics.median(found[kind]) for kind in ("load", "vision", "prefill"))
        print(f"{name:20} " + " ".join(f"{median:10.1f}" for median in medians))
    variants = [asdict(variant) for variant in together.manifest.variants]
    print(json.dumps({"one": one, "all": size, "variants": variants, "samples": samples}))


if __name__ == "__main__":
    main()
