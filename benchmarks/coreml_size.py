"""Bytes of real Core ML packages at a published shape, beside the bf16 source.

    python benchmarks/coreml_size.py --work shapes

Three cases: dense; the grids of `int4-small`; 2-bit codebooks of 256 vectors of 4 weights in every
matrix. Measured from the files, with what `plan` predicts beside it. Each export runs in a fresh
process that loads the checkpoint first, so that its memory is its own. Prints one JSON line at the
end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest
from pocketvlm.context import RunContext
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.export.coreml.toolkit import listen
from pocketvlm.machine import peak_rss_bytes
from pocketvlm.models.layers import LinearSpec, Part
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.recipes.load import load_recipe
from pocketvlm.reference.random_models import write_shape
from pocketvlm.reference.shapes import load_shape
from pocketvlm.stages import PlanState
from pocketvlm.weights.codebook import CodebookWeight, Lookup
from pocketvlm.weights.layout import CodebookLayout, WeightLayout

Planned = dict[LinearSpec, WeightLayout | None]

_SHAPE = "smolvlm-256m"
_RECIPE = "int4-small"
_TABLES = CodebookLayout(index_bits=8, vector_length=4)
_DECODER_PARTS: tuple[Part, ...] = ("decoder", "embedding", "head")


def leave(checkpoint: Checkpoint) -> Planned:
    """Weights as they are."""
    return dict.fromkeys(checkpoint.spec.linears())


def quantize(checkpoint: Checkpoint) -> Planned:
    """Rounds to the grids of a recipe's quantizing stage."""
    rules = [rule for stage in load_recipe(_RECIPE).stages for rule in getattr(stage, "rules", ())]
    stage = RoundToNearest(rules=tuple(rules))
    # Rounding looks at no sample.
    stage.apply(checkpoint, CalibrationSet.synthetic(1), RunContext())
    return dict(stage.plan(PlanState.of(checkpoint.spec)).layouts)


def look_up(checkpoint: Checkpoint) -> Planned:
    """Random codebooks in every matrix: bytes do not depend on values."""
    generator = torch.Generator().manual_seed(0)
    planned: Planned = {}
    for linear in checkpoint.spec.linears():
        shape = (linear.out_features // 4, linear.in_features)
        indices = torch.randint(256, shape, generator=generator).to(torch.uint8)
        codebooks = torch.randn(1, 1, 256, 4, generator=generator).to(torch.float16)
        lookup = Lookup.from_indices(indices, codebooks, index_bits=8)
        checkpoint.set_form(linear.name, CodebookWeight(main=lookup))
        planned[linear] = _TABLES
    return planned


def export(path: Path, folder: Path) -> None:
    """What the fresh process does; prints its time and memory as JSON."""
    checkpoint = load_checkpoint(path)
    with listen():
        before = peak_rss_bytes()
    started = time.perf_counter()
    ToCoreml().export(checkpoint, folder, RunContext())
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "added_bytes": peak_rss_bytes() - before}))


def measure(name: str, compress: Callable[[Checkpoint], Planned], work: Path) -> dict[str, Any]:
    """Sizes, prediction, time and memory of one case."""
    checkpoint = Checkpoint.load(write_shape(load_shape(_SHAPE), work / _SHAPE, is_split=False))
    planned = compress(checkpoint)
    saved, folder = work / f"{_SHAPE}-{name}", work / f"coreml-{name}"
    checkpoint.save(saved)
    finished = subprocess.run(
        [sys.executable, __file__, "--work", work, "--export", saved, folder],
        capture_output=True,
        text=True,
        check=True,
    )
    packages = {
        package.stem: sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
        for package in sorted((folder / "coreml").iterdir())
    }
    decoder = sum(
        2 * linear.out_features * linear.in_features
        for linear in planned
        if linear.part in _DECODER_PARTS
    )
    written = sum(packages.values())
    predicted = sum(ToCoreml().predict(checkpoint.spec, planned).part_bytes.values())
    return {
        "packages_bytes": packages,
        "source_bytes": checkpoint.source.weight_bytes,
        "share": written / checkpoint.source.weight_bytes,
        "decoder_source_bytes": decoder,
        "decoder_share": packages["decoder"] / decoder,
        "prediction_error": predicted / written - 1,
        **json.loads(finished.stdout.splitlines()[-1]),
    }


def main() -> None:
    """Writes the packages of every case and compares them with source and bound."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and packages")
    parser.add_argument("--export", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export is not None:
        export(*options.export)
        return
    result: dict[str, Any] = {"shape": _SHAPE}
    for name, compress, bound in (
        ("dense", leave, ""),
        (_RECIPE, quantize, "all at most 0.30"),
        ("lut-v4-k256", look_up, "decoder at most 0.17"),
    ):
        case = result[name] = measure(name, compress, options.work)
        sizes = ", ".join(f"{k} {v / 1e6:.1f} MB" for k, v in case["packages_bytes"].items())
        print(
            f"{name}: {sizes}; {case['share']:.4f} of the source, decoder alone "
            f"{case['decoder_share']:.4f} {f'({bound})' if bound else ''}\n"
            f"  predicted {case['prediction_error']:+.2%}; export {case['seconds']:.1f} s, "
            f"{case['added_bytes'] / 1e6:.0f} MB beyond the loaded checkpoint"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
