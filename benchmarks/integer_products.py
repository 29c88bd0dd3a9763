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
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pocketvlm.bundle import TensorSignature
from pocketvlm.export.onnx.byte_rows import RoundedOver, integer_product
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
_OVER: dict[str, RoundedOver] = {"int8 rows, a tile": "tile", "int8 rows, a row": "row"}
_GROUPED = {
    f"int{bits} g{group}": (bits, group)
    for bits, group in ((8, 32), (8, 128), (8, 256), (4, 32), (4, 64), (4, 128))
}
_KERNELS = ("float32", *_OVER, *_GROUPED)
_MANY_ROWS = 100


def build_product(graph: GraphWriter, kernel: str, columns: int, rows: int) -> str:
    """The product by one kernel, of the graph's input `x`."""
    random = np.random.default_rng(0)
    bias = graph.constant("bias", np.zeros(rows, np.float32))
    if kernel == "float32":
        dense = graph.constant("dense", random.standard_normal((rows, columns), np.float32))
        product = graph.node("FusedMatMul", ["x", dense], name="product", domain=CONTRIB, transB=1)
        return graph.node("Add", [product, bias], name="biased")
    if kernel in _OVER:
        codes = graph.constant("codes", random.integers(-127, 128, (rows, columns), dtype=np.int8))
        scales = graph.constant("scales", np.full(rows, 1e-3, np.float32))
        operands = ("x", codes, scales)
        return integer_product(graph, "rows", operands, bias, rounded_over=_OVER[kernel])
    bits, group = _GROUPED[kernel]
    groups = -(-columns // group)
    shape = (rows, groups, group * bits // 8)
    codes = graph.constant("codes", random.integers(0, 256, shape, dtype=np.uint8))
    scales = graph.constant("scales", np.full((rows, groups), 1e-3, np.float32))
    return graph.node(
        "MatMulNBits",
        ["x", codes, scales, "", "", bias],
        name="groups",
        domain=CONTRIB,
        K=columns,
        N=rows,
        bits=bits,
        block_size=group,
        accuracy_level=4,
    )


def open_product(
    kernel: str, columns: int, rows: int, threads: int, folder: Path
) -> onnxruntime.InferenceSession:
    """A session with nothing but that product."""
    path = folder / f"{kernel.replace(' ', '-').replace(',', '')}.onnx"
    with WeightFile(path.with_suffix(".bin")) as weights:
        graph = GraphWriter("product", weights, opset=18)
        value = build_product(graph, kernel, columns, rows)
        graph.node("Identity", [value], name="y", output="y")
        graph.save(
            path,
            [TensorSignature(name="x", dtype="float32", shape=(1, "n", columns))],
            [TensorSignature(name="y", dtype="float32", shape=(1, "n", rows))],
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    require_exact_sums(options)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Times the products in turns, prints shares of float32."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    document: dict[str, Any] = {"environment": describe_environment(options.threads)}
    for label, (count, columns, rows) in _PRODUCTS.items():
        with tempfile.TemporaryDirectory() as name:
            found = {
                kernel: open_product(kernel, columns, rows, options.threads, Path(name))
                for kernel in _KERNELS
            }
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
