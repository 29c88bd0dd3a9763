"""Bytes of masked weights, predicted, real and compressed, and decode speed, at a published shape.

    python benchmarks/sparse_size.py --work shapes
    python benchmarks/sparse_size.py --work shapes --speed

Random weights at the SmolVLM-256M shape, of which tower, projector and decoder lose half: element
by element, 2 of 4, or in blocks; alone as floats, and under int4. Bytes do not depend on values,
nor does dense speed, so masks are drawn. Compressed is each file by itself, by `zstd -19`, where
`zstd` is installed. `--speed` times ONNX bundles that the first command wrote: decode steps of a
model of which half is zero and of the same model with nothing masked take turns. Prints tables,
and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from pocketvlm.bundle import Bundle
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.unstructured.patterns import (
    Blocked,
    Pattern,
    SemiStructured,
    Unstructured,
)
from pocketvlm.compress.quantization.affine.grid import AffineScheme
from pocketvlm.compress.quantization.affine.rtn import round_to_nearest
from pocketvlm.context import RunContext
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.export.executorch.target import ToExecutorch
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.models.layers import LinearSpec
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.reference import reference_model_path
from pocketvlm.reference.random_models import write_shape
from pocketvlm.reference.shapes import list_shapes, load_shape
from pocketvlm.runtime.onnx.runner import OnnxRunner
from pocketvlm.stages import Target
from pocketvlm.weights.layout import AffineLayout, SparseLayout, WeightLayout, plan_behind_mask
from pocketvlm.weights.sparse import SparseWeight

_PATTERNS: Mapping[str, Pattern | None] = {
    "none": None,
    "50 %": Unstructured(),
    "2:4": SemiStructured(),
    "1 x 16": Blocked(),
}
_FLOAT = 16
_GROUP = 32
_ROUNDS = 5
_STEPS = 12
_PRUNED = ("tower", "projector", "decoder")

Plans = Mapping[LinearSpec, WeightLayout | None]


def draw_mask(pattern: Pattern, rows: int, columns: int, random: torch.Generator) -> torch.Tensor:
    """Half of the elements by a pattern, drawn: bytes do not depend on which they are."""
    if isinstance(pattern, SemiStructured):
        chosen = torch.tensor(list(combinations(range(pattern.of), pattern.keep)))
        table = torch.zeros(len(chosen), pattern.of, dtype=torch.bool)
        table[torch.arange(len(chosen))[:, None], chosen] = True
        drawn = torch.randint(len(table), (rows, columns // pattern.of), generator=random)
        return table[drawn].view(rows, columns)
    high, wide = (pattern.rows, pattern.columns) if isinstance(pattern, Blocked) else (1, 1)
    scores = torch.rand(rows // high, columns // wide, generator=random)
    cells = scores > scores.median(dim=1, keepdim=True).values
    return cells.repeat_interleave(high, 0).repeat_interleave(wide, 1)


def make(model: Path, pattern: Pattern | None, bits: int | None) -> tuple[Checkpoint, Plans]:
    """A model of which half is masked, rounded to symmetric integers where `bits` says so."""
    random = torch.Generator().manual_seed(0)
    checkpoint = Checkpoint.load(model)
    plans: dict[LinearSpec, WeightLayout | None] = {}
    for linear in checkpoint.spec.linears():
        form = checkpoint.form(linear.name)
        plan: WeightLayout | None = None
        mask: SparseLayout | None = None
        if pattern is not None and linear.part in _PRUNED:
            form = SparseWeight.from_form(form, draw_mask(pattern, *form.shape, random))
            plan = mask = SparseLayout(density=0.5)
        if bits is not None:
            grid = AffineLayout(bits=bits, group_size=_GROUP, symmetric=True)
            plan = plan_behind_mask(linear.name, mask, grid) if mask is not None else grid
            scheme = AffineScheme(bits=bits, symmetric=True)
            form, _ = round_to_nearest(form, scheme=scheme, group_size=_GROUP)
        checkpoint.set_form(linear.name, form)
        plans[linear] = plan
    return checkpoint, plans


TARGETS: Mapping[str, Target] = {
    "onnx": ToOnnx(),
    "coreml": ToCoreml(),
    "executorch": ToExecutorch(),
}


def compressed_bytes(files: list[Path]) -> int | None:
    """Bytes of files that `zstd -19` compresses one by one; `None` without the program."""
    program = shutil.which("zstd")
    if program is None:
        return None
    command = [program, "--quiet", "--stdout", "-19"]
    return sum(
        len(subprocess.run([*command, file], stdout=subprocess.PIPE, check=True).stdout)
        for file in files
    )


def decode_ratio(plain: Path, masked: Path) -> dict[str, Any]:
    """Milliseconds per token of two bundles that take turns, and their ratio by round."""
    runners = {
        label: OnnxRunner(Bundle.open(path, verify=False), capacity=256, keep_vision=False)
        for label, path in (("dense", plain), ("zeros", masked))
    }
    samples: dict[str, list[float]] = {label: [] for label in runners}
    for _ in range(_ROUNDS + 1):
        for label, runner in runners.items():
            runner.reset()
            runner.decode(runner.embed(list(range(3, 35))), np.arange(32)[None])
            started = perf_counter()
            for step in range(_STEPS):
                runner.decode(runner.embed([5]), np.array([[32 + step]]))
            samples[label].append((perf_counter() - started) / _STEPS * 1e3)
    ratios = [z / d for d, z in zip(samples["dense"][1:], samples["zeros"][1:], strict=True)]
    return {
        "dense_ms": median(samples["dense"][1:]),
        "zeros_ms": median(samples["zeros"][1:]),
        "ratio": median(ratios),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def folder_of(work: Path, pattern: str, bits: int, label: str) -> Path:
    """Where a bundle is written."""
    name = f"{pattern}-{bits}-{label}"
    return work / "".join(c if c.isalnum() else "-" for c in name)


def measure_sizes(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Writes every bundle and says what it weighs, and what `plan` says."""
    source = Checkpoint.load(model).source.weight_bytes
    print(f"{options.model}: bf16 source {source / 1e6:.1f} MB")
    rows: list[dict[str, Any]] = []
    for bits in options.bits:
        for name in options.patterns:
            pattern = _PATTERNS[name]
            checkpoint, plans = make(model, pattern, None if bits == _FLOAT else bits)
            for label in options.targets:
                target = TARGETS[label]
                folder = folder_of(options.work, name, bits, label)
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                write_graphs(checkpoint, (target,), folder, "0" * 64, RunContext())
                files = [file for file in (folder / target.method).rglob("*") if file.is_file()]
                real = sum(file.stat().st_size for file in files)
                small = compressed_bytes(files)
                said = sum(target.predict(checkpoint.spec, plans).part_bytes.values())
                row = {"pattern": name, "bits": bits, "target": label, "bytes": real}
                rows.append({**row, "zstd_bytes": small, "predicted_bytes": said})
                shipped = "no zstd here" if small is None else f"zstd -19 {small / 1e6:9.2f} MB"
                print(
                    f"{name:7s} {bits:2d} bits  {label:10s} {real / 1e6:9.2f} MB  {shipped}  "
                    f"{real / source:.4f} of the source  predicted {said / real - 1:+.2%}",
                    flush=True,
                )
    return {"model": options.model, "source_bytes": source, "sizes": rows}


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Decode speed with and without zeros."""
    result: dict[str, Any] = {"model": options.model, "decode": []}
    for bits in options.bits:
        plain, zeros = (folder_of(options.work, name, bits, "onnx") for name in ("none", "50 %"))
        ratio = decode_ratio(plain, zeros)
        result["decode"].append({"bits": bits, **ratio})
        print(
            f"{bits} bits: a token takes {ratio['dense_ms']:.2f} ms dense and "
            f"{ratio['zeros_ms']:.2f} ms with half of the weights zero, {ratio['ratio']:.3f} times "
            f"as long ({min(ratio['ratios']):.3f} to {max(ratio['ratios']):.3f})"
        )
    return result


def main() -> None:
    """Measures sizes, or speed on bundles that an earlier run wrote."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and bundles")
    parser.add_argument("--model", default="smolvlm-256m", help="a shape, or a reference model")
    parser.add_argument("--targets", nargs="+", default=["onnx", "coreml"], choices=TARGETS)
    parser.add_argument("--patterns", nargs="+", default=list(_PATTERNS), choices=_PATTERNS)
    parser.add_argument("--bits", nargs="+", type=int, default=[_FLOAT, 4], help="16 for floats")
    parser.add_argument("--speed", action="store_true", help="time what was written before")
    options = parser.parse_args()
    if options.speed:
        result = measure_speed(options)
    elif options.model in list_shapes():
        result = measure_sizes(
            write_shape(load_shape(options.model), options.work / options.model, is_split=False),
            options,
        )
    else:
        result = measure_sizes(reference_model_path(options.model), options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
