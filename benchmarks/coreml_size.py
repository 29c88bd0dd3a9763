"""Bytes of real Core ML packages at a published shape, beside the bf16 source.

    python benchmarks/coreml_size.py --work shapes

Two cases: the grids of `int4-small`, and 2-bit codebooks of 256 vectors of 4 weights in every
matrix. Measured from the files; what `plan` predicts stands beside it. The time and the peak
memory of the exports are printed too. Prints one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.rtn import RoundToNearest
from pocketvlm.context import RunContext
from pocketvlm.export.coreml import ToCoreml
from pocketvlm.modelspec import LinearSpec
from pocketvlm.planned import PlannedCodebook, PlannedForm
from pocketvlm.recipes.load import load_recipe
from pocketvlm.report import peak_rss_bytes
from pocketvlm.testing import write_shape
from pocketvlm.weights import CodebookWeight, Lookup

_SHAPE = "smolvlm-256m"
_PLANNED_LUT = PlannedCodebook(index_bits=8, vector_length=4)
_DECODER_PARTS = ("decoder", "embedding", "head")


def quantize(checkpoint: Checkpoint, recipe: str) -> dict[LinearSpec, PlannedForm | None]:
    """Rounds to the grids of a recipe's quantizing stage."""
    rules = [rule for stage in load_recipe(recipe).stages for rule in getattr(stage, "rules", ())]
    stage = RoundToNearest(rules=tuple(rules))
    # Rounding looks at no sample.
    stage.apply(checkpoint, CalibrationSet.synthetic(1), RunContext())
    return dict(stage.plan_forms(checkpoint.spec))


def look_up(checkpoint: Checkpoint) -> dict[LinearSpec, PlannedForm | None]:
    """Random codebooks in every matrix that vectors of four divide: bytes ignore values."""
    generator = torch.Generator().manual_seed(0)
    planned: dict[LinearSpec, PlannedForm | None] = {}
    for linear in checkpoint.spec.linears():
        rows, columns = linear.out_features, linear.in_features
        indices = torch.randint(256, (rows // 4, columns), generator=generator).to(torch.uint8)
        codebooks = torch.randn(1, 1, 256, 4, generator=generator).to(torch.float16)
        form = CodebookWeight(main=Lookup.from_indices(indices, codebooks, index_bits=8))
        checkpoint.set_form(linear.name, form)
        planned[linear] = _PLANNED_LUT
    return planned


def folder_bytes(path: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def main() -> None:
    """Writes the packages of both cases and compares them with their source and their bound."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and packages")
    options = parser.parse_args()
    source = write_shape(_SHAPE, options.work / _SHAPE)
    result: dict[str, Any] = {"shape": _SHAPE}
    for name, bound, is_decoder in (("int4-small", 0.30, False), ("lut v4 k256", 0.17, True)):
        checkpoint = Checkpoint.load(source)
        planned = look_up(checkpoint) if is_decoder else quantize(checkpoint, name)
        folder = options.work / f"coreml-{name.partition(' ')[0]}"
        before, started = peak_rss_bytes(), time.perf_counter()
        ToCoreml().export(checkpoint, folder, RunContext())
        seconds = time.perf_counter() - started
        sizes = {package.name: folder_bytes(package) for package in (folder / "coreml").iterdir()}
        parts = _DECODER_PARTS if is_decoder else None
        weights = 2 * sum(
            linear.out_features * linear.in_features
            for linear in checkpoint.spec.linears()
            if parts is None or linear.part in parts
        )
        whole = weights if is_decoder else checkpoint.source.weight_bytes
        total = sizes["decoder.mlpackage"] if is_decoder else sum(sizes.values())
        predicted = sum(ToCoreml().predict(checkpoint.spec, planned).part_bytes.values())
        result[name] = {
            "packages_bytes": sizes,
            "source_bytes": whole,
            "share": total / whole,
            "predicted_bytes": predicted,
            "seconds": seconds,
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_rss_before_bytes": before,
        }
        what = "decoder, embedding and head" if is_decoder else "all"
        print(
            f"\n{name}: {total / 1e6:.1f} MB of {whole / 1e6:.1f} MB bf16 ({what}), "
            f"{total / whole:.4f} (bound {bound}); {seconds:.1f} s"
        )
        for package, count in sorted(sizes.items()):
            print(f"  {package:20s} {count / 1e6:8.2f} MB")
        written = sum(sizes.values())
        print(f"  predicted {predicted / 1e6:.2f} MB, {predicted / written - 1:+.2%}")
        print(f"  peak RSS {before / 1e6:.0f} MB before, {peak_rss_bytes() / 1e6:.0f} MB after")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
