"""A 2-bit vector-codebook Core ML decoder beside torch: how far its logits are.

    python benchmarks/coreml_codebook.py [MODEL ...] [--rows 48]

Every matrix of decoder and embedding becomes indices into 256 vectors of 4 (2 bits per weight), by
a few rounds of k-means. Whether that answers well is not the question here; whether the package
computes what torch computes is. The packages are computed by the reference evaluator, which is not
Core ML. MODEL is what `pocketvlm compress` takes. Prints a table, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pocketvlm.bundle import Bundle
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.export.parity.metrics import sqnr_db
from pocketvlm.export.torch_runner import TorchRunner
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.pipeline.sources import resolve_model
from pocketvlm.runtime.coreml.runner import CoremlRunner
from pocketvlm.weights.codebook import CodebookWeight, Lookup
from pocketvlm.weights.modules import cache_dense_weights

_LENGTH, _ENTRIES, _BITS = 4, 256, 8


def cluster(weight: torch.Tensor, rounds: int = 3, seen: int = 16384) -> CodebookWeight:
    """Vectors of 4 rows, assigned to 256 centroids of a sample of them."""
    rows, columns = weight.shape
    vectors = weight.view(rows // _LENGTH, _LENGTH, columns).transpose(1, 2).reshape(-1, _LENGTH)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(vectors), generator=generator)
    sample = vectors[order[:seen]]
    centroids = sample[:_ENTRIES].clone()
    for _ in range(rounds):
        nearest = torch.cdist(sample, centroids).argmin(1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, sample)
        counts = torch.bincount(nearest, minlength=_ENTRIES)[:, None]
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    parts = [torch.cdist(part, centroids).argmin(1) for part in vectors.split(1 << 18)]
    lookup = Lookup.from_indices(
        torch.cat(parts).view(rows // _LENGTH, columns),
        centroids.half()[None, None],
        index_bits=_BITS,
    )
    return CodebookWeight(main=lookup)


def compress(checkpoint: Checkpoint) -> None:
    """Decoder and embedding, in place; a matrix whose rows 4 does not divide stays as it is."""
    for linear, form in checkpoint.forms().items():
        if linear.part in ("decoder", "embedding", "head") and form.shape[0] % _LENGTH == 0:
            checkpoint.set_form(linear.name, cluster(form.dequantize()))


def compare(model: str, precision: Literal["float16", "float32"], rows: int) -> dict[str, Any]:
    """Logits after a prompt of random rows and after eight single rows."""
    checkpoint = Checkpoint.load(resolve_model(model))
    source = sum(form.shape[0] * form.shape[1] * 2 for form in checkpoint.forms().values())
    compress(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        target = ToCoreml(precision=precision, context=max(128, rows + 8))
        write_graphs(checkpoint, (target,), path, "", RunContext(threads=1))
        decoder = path / "coreml" / "decoder.mlpackage"
        size = sum(file.stat().st_size for file in decoder.rglob("*") if file.is_file())
        start = time.perf_counter()
        runner = CoremlRunner(Bundle.open(path))
        load_s = time.perf_counter() - start
    reference = TorchRunner(checkpoint)
    random = np.random.default_rng(0)
    spec = checkpoint.spec.decoder
    table = reference.embed(random.integers(0, spec.vocab_size, rows + 8).tolist())
    found, expected = [], []
    with cache_dense_weights(checkpoint.model):
        for first, last in ((0, rows), *((row, row + 1) for row in range(rows, rows + 8))):
            places = np.arange(first, last)[None]
            found.append(runner.decode(table[:, first:last], places).copy())
            expected.append(reference.decode(table[:, first:last], places).copy())
    ours, theirs = np.stack(found), np.stack(expected)
    dense = sum(
        form.shape[0] * form.shape[1] * 2
        for linear, form in checkpoint.forms().items()
        if linear.part in ("decoder", "embedding", "head")
    )
    return {
        "model": model,
        "precision": precision,
        "decoder_bytes": size,
        "decoder_share": size / dense,
        "source_bytes": source,
        "sqnr_db": sqnr_db(ours, theirs),
        "max_abs_logit": float(np.abs(ours - theirs).max()),
        "largest_logit": float(np.abs(theirs).max()),
        "argmax_equal": float((ours.argmax(1) == theirs.argmax(1)).mean()),
        "load_s": load_s,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    models = ["reference:pocket-llava", "reference:pocket-smol"]
    parser.add_argument("models", nargs="*", default=models)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--precision", nargs="+", default=["float16", "float32"])
    arguments = parser.parse_args()
    names = ("bytes", "share", "SQNR dB", "max error")
    print(f"{'model':<26} {'computes in':<11} {names[0]:>12} ", end="")
    print(f"{names[1]:>6} {names[2]:>8} {names[3]:>10}")
    rows = []
    for model in arguments.models:
        for precision in arguments.precision:
            row = compare(model, precision, arguments.rows)
            rows.append(row)
            print(
                f"{model:<26} {precision:<11} {row['decoder_bytes']:>12,} "
                f"{row['decoder_share']:>6.3f} {row['sqnr_db']:>8.1f} {row['max_abs_logit']:>10.2e}"
            )
    print(json.dumps({"benchmark": "coreml_codebook", "rows": rows}))


if __name__ == "__main__":
    main()
