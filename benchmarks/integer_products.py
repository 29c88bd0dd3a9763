"""Which kernel of ONNX Runtime is fast at the products of towers and prompts, beside float32.

    python benchmarks/integer_products.py --threads 1

Single products of SmolVLM-256M's shape, random weights, biases included; all kernels take turns.
Times are processor time, which other work on the machine leaves alone as long as a session has one
thread. Prints shares of float32, and one JSON line with every raw sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pocketvlm.bundle import TensorSignature
from pocketvlm.export.onnx.byte_rows import integer_product
from pocketvlm.export.onnx.writer import CONTRIB, GraphWriter, WeightFile
from pocketvlm.machine import describe_environment
from pocketvlm.runtime.onnx.engine import onnxruntime, require_exact_sums

# Rows of the input, columns and rows of the weight.
_PRODUCTS = {
    "tower q, k, v": (1024, 768, 2304),
    "tower o": (1024, 768, 768),
    "tower fc1": (1024, 768, 3072),
    "tower fc2": (1024, 3072, 768),
    "projector": (64, 12288, 576),
    "prompt of 96, gate and up": (96, 576, 3072),
    "prompt of 96, down": (96, 1536, 576),
    "prompt of 1,024, gate and up": (1024, 576, 3072),
    "a token, gate and up": (1, 576, 3072),
}
_GROUPED = ((8, 32), (8, 128), (8, 256), (4, 32), (4, 64), (4, 128))
_MANY_ROWS = 100


def products(graph: GraphWriter, columns: int, rows: int) -> Iterator[tuple[str, str]]:
    """The same product by every kernel: its name, and its value."""
    random = np.random.default_rng(0)
    bias = graph.constant("bias", np.zeros(rows, np.float32))
    dense = graph.constant("dense", random.standard_normal((rows, columns), np.float32))
    product = graph.node("FusedMatMul", ["x", dense], name="float", domain=CONTRIB, transB=1)
    yield "float32", graph.node("Add", [product, bias], name="float32")
    codes = graph.constant("codes", random.integers(-127, 128, (rows, columns), dtype=np.int8))
    scales = graph.constant("scales", np.full(rows, 1e-3, np.float32))
    for over in ("tile", "row"):
        found = integer_product(graph, over, ("x", codes, scales), bias, rounded_over=over)
        yield f"int8 rows, a {over}", found
    for bits, group in _GROUPED:
        groups = -(-columns // group)
        shape = (rows, groups, group * bits // 8)
        name = f"int{bits} g{group}"
        packed = graph.constant(f"{name}.codes", random.integers(0, 256, shape, dtype=np.uint8))
        steps = graph.constant(f"{name}.scales", np.full((rows, groups), 1e-3, np.float32))
        yield (
            name,
            graph.node(
                "MatMulNBits",
                ["x", packed, steps, "", "", bias],
                name=name,
                domain=CONTRIB,
                K=columns,
                N=rows,
                bits=bits,
                block_size=group,
                accuracy_level=4,
            ),
        )


def sessions(
    columns: int, rows: int, threads: int, folder: Path
) -> dict[str, onnxruntime.InferenceSession]:
    """A session for each kernel."""
    with WeightFile(folder / "names.bin") as weights:
        names = [name for name, _ in products(GraphWriter("n", weights, opset=18), columns, rows)]
    found = {}
    for index, name in enumerate(names):
        with WeightFile(folder / f"{index}.bin") as weights:
            graph = GraphWriter("product", weights, opset=18)
            value = dict(products(graph, columns, rows))[name]
            graph.node("Identity", [value], name="y", output="y")
            path = folder / f"{index}.onnx"
            graph.save(
                path,
                [TensorSignature(name="x", dtype="float32", shape=(1, "n", columns))],
                [TensorSignature(name="y", dtype="float32", shape=(1, "n", rows))],
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        require_exact_sums(options)
        found[name] = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
    return found


def main() -> None:
    """Times the products in turns, prints shares of float32."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    document: dict[str, Any] = {"environment": describe_environment(options.threads)}
    for label, (count, columns, rows) in _PRODUCTS.items():
        with tempfile.TemporaryDirectory() as name:
            found = sessions(columns, rows, options.threads, Path(name))
            inputs = torch.randn(1, count, columns, generator=torch.Generator().manual_seed(0))
            samples: dict[str, list[float]] = {kernel: [] for kernel in found}
            rounds = options.rounds if count > _MANY_ROWS else 10 * options.rounds
            for turn in range(rounds + 1):
                for kernel, session in found.items():
                    start = time.process_time()
                    session.run(None, {"x": inputs.numpy()})
                    if turn:  # the first round warms up
                        samples[kernel].append((time.process_time() - start) * 1e3)
            del found
        medians = {kernel: statistics.median(taken) for kernel, taken in samples.items()}
        shares = {kernel: medians[kernel] / medians["float32"] for kernel in medians}
        print(
            f"{label}, {count} x {columns} x {rows}: float32 {medians['float32']:.2f} ms; "
            + ", ".join(f"{kernel} {share:.2f}" for kernel, share in shares.items() if share != 1)
        )
        document[label] = {"samples_ms": samples, "share": shares}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
