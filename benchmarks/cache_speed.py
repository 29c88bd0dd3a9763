"""What an int8 KV cache costs and saves in ONNX Runtime's attention, beside a float32 one.

    python benchmarks/cache_speed.py --threads 1

One `GroupQueryAttention` node of a decoder's shape, past and present in the same buffers. Both
caches take turns. Prints a table, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from pocketvlm.runtime.onnx.engine import onnxruntime

# Heads, heads of keys and values, channels of a head.
_SHAPES = {"SmolVLM-256M": (9, 3, 64), "SmolVLM-500M": (15, 5, 64), "16/8/128": (16, 8, 128)}
_ROUNDS = 9


class Attention:
    """One node with its cache."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        rows: int,
        dtype: type[np.float32 | np.int8],
        threads: int,
    ) -> None:
        heads, kv_heads, width = shape
        self._packed, self._rows = (heads + 2 * kv_heads) * width, rows
        element = {np.float32: TensorProto.FLOAT, np.int8: TensorProto.INT8}[dtype]
        cache = [1, kv_heads, rows, width]
        names = ["packed", "", "", "past_key", "past_value", "last", "total", "cosine", "sine"]
        constants: dict[str, np.ndarray] = {
            "cosine": np.ones((rows, width // 2), np.float32),
            "sine": np.zeros((rows, width // 2), np.float32),
        }
        attributes: dict[str, Any] = {}
        if dtype is np.int8:
            names += ["", "", "", "key_scales", "value_scales"]
            for name in names[-2:]:
                constants[name] = np.full((kv_heads, width), 0.03, np.float32)
            attributes = {f"{kind}_quant_type": "PER_CHANNEL" for kind in "kv"}
            attributes["kv_cache_bit_width"] = 8
        node = helper.make_node(
            "GroupQueryAttention",
            names,
            ["attended", "present_key", "present_value"],
            domain="com.microsoft",
            num_heads=heads,
            kv_num_heads=kv_heads,
            do_rotary=1,
            **attributes,
        )
        value = helper.make_tensor_value_info
        inputs = [
            value("packed", TensorProto.FLOAT, [1, "length", self._packed]),
            value("past_key", element, cache),
            value("past_value", element, cache),
            value("last", TensorProto.INT32, [1]),
            value("total", TensorProto.INT32, []),
        ]
        outputs = [
            value("attended", TensorProto.FLOAT, [1, "length", heads * width]),
            value("present_key", element, cache),
            value("present_value", element, cache),
        ]
        graph = helper.make_graph(
            [node],
            "attention",
            inputs,
            outputs,
            [helper.make_tensor(k, 1, v.shape, v.ravel()) for k, v in constants.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._binding = self._session.io_binding()
        self._held: list[np.ndarray] = [np.ones(cache, dtype), np.ones(cache, dtype)]
        for kind, buffer in zip(("key", "value"), self._held, strict=True):
            shared = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)
            self._binding.bind_ortvalue_input(f"past_{kind}", shared)
            self._binding.bind_ortvalue_output(f"present_{kind}", shared)

    def seconds(self, length: int, repeats: int) -> float:
        """Seconds of one run of the cache's last `length` rows, mean of `repeats`."""
        packed = np.random.default_rng(0).standard_normal((1, length, self._packed))
        self._binding.bind_cpu_input("packed", packed.astype(np.float32))
        self._binding.bind_cpu_input("last", np.array([self._rows - 1], np.int32))
        self._binding.bind_cpu_input("total", np.array(self._rows, np.int32))
        self._binding.bind_output("attended")  # its shape changes with the length
        self._session.run_with_iobinding(self._binding)
        started = time.perf_counter()
        for _ in range(repeats):
            self._session.run_with_iobinding(self._binding)
        return (time.perf_counter() - started) / repeats


def measure(name: str, rows: int, threads: int) -> dict[str, Any]:
    """The fastest rounds of both caches, which take turns."""
    nodes = {
        np.dtype(dtype).name: Attention(_SHAPES[name], rows, dtype, threads)
        for dtype in (np.float32, np.int8)
    }
    found: dict[str, list[float]] = {}
    for _ in range(_ROUNDS):
        for dtype, node in nodes.items():
            found.setdefault(f"decode_us_{dtype}", []).append(1e6 * node.seconds(1, 20))
            found.setdefault(f"prefill_us_{dtype}", []).append(1e6 * node.seconds(rows, 1))
    best = {key: min(values) for key, values in found.items()}
    return {"shape": name, "rows": rows, "threads": threads, **best}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    rows = [measure(name, size, arguments.threads) for name in _SHAPES for size in (128, 1024)]
    print(f"{'shape':<14} {'rows':>5} {'':>8} {'float32 us':>11} {'int8 us':>9} {'ratio':>6}")
    for row in rows:
        for work in ("decode", "prefill"):
            plain, rounded = row[f"{work}_us_float32"], row[f"{work}_us_int8"]
            print(
                f"{row['shape']:<14} {row['rows']:>5} {work:>8} {plain:>11.1f} {rounded:>9.1f} "
                f"{rounded / plain:>6.2f}"
            )
    print(json.dumps({"benchmark": "cache_speed", "rows": rows}))


if __name__ == "__main__":
    main()
