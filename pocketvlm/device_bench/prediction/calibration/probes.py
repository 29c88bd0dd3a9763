"""Probes: what a calibration times, each a graph of one operator at sizes that models have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from pocketvlm.device_bench.prediction.calibration.graphs import (
    CONTRIB,
    OperatorGraph,
    ProductShape,
)
from pocketvlm.device_bench.runner.bandwidth import last_level_cache_bytes
from pocketvlm.runtime.onnx.engine import onnxruntime as ort
from pocketvlm.runtime.onnx.engine import require_exact_sums

__all__ = [
    "ACTIVATIONS",
    "Probe",
    "activation_probe",
    "cached_attention_probe",
    "call_probe",
    "copy_probe",
    "norm_probe",
    "product_probe",
    "tower_attention_probe",
]

ACTIVATIONS: Mapping[str, tuple[str, Mapping[str, float]]] = {
    "gelu": ("Gelu", {}),
    "gelu_pytorch_tanh": ("FastGelu", {}),
    "quick_gelu": ("QuickGelu", {"alpha": 1.702}),
    "silu": ("QuickGelu", {"alpha": 1.0}),
}
"""Operator and attributes by the name that Hugging Face gives an activation."""

_CACHE_SHARE = 3
_LEAST_STREAMED_BYTES = 48 * 2**20
_INT8_LEVEL = 4
_CAPACITY = 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """Something that can be timed.

    Attributes:
        run: Runs it once.
        nodes: Nodes in it.
    """

    run: Callable[[], object]
    nodes: int


def product_probe(
    widths: tuple[int, int],
    rows: int,
    threads: int,
    *,
    bits: int | None,
    group_size: int = 0,
    streamed_bytes: int | None = None,
    has_norms: bool = False,
) -> Probe:
    """A chain of products [a -> b -> a ...].

    Of one row it holds more weights than the processor's cache, so that each is read from memory,
    as in a decoder; of many rows it is one pair.

    Args:
        widths: a and b.
        rows: Rows of the input.
        threads: Threads of the session.
        bits: Of a code; `None` for float32.
        group_size: Columns that share a scale; 0 for all of a row, of 8 bits.
        streamed_bytes: Weights of one row's chain at least; `None` for more than any cache holds.
        has_norms: Whether a norm follows each product: what another node costs between them, which
            find nothing of theirs in the nearest caches.
    """
    weights = widths[0] * widths[1]
    nodes = 2
    if rows == 1:
        nodes = 2 * math.ceil(
            (streamed_bytes or _streamed_bytes()) / (2 * weights * (bits or 32) / 8)
        )
    graph = OperatorGraph()
    value = graph.input("rows", [1, rows, widths[0]])
    for index in range(nodes):
        columns, outputs = widths if index % 2 == 0 else widths[::-1]
        shape = ProductShape(rows=outputs, columns=columns)
        if bits is None:
            value = graph.dense_product(value, shape)
        elif not group_size:
            value = graph.byte_product(value, shape)
        else:
            value = graph.quantized_product(
                value, shape, bits=bits, group_size=group_size, accuracy_level=_INT8_LEVEL
            )
        if has_norms:
            scale = graph.constant(np.ones(outputs, np.float32))
            value = graph.node("RMSNormalization", [value, scale], epsilon=1e-6)
    graph.output(value, [1, rows, widths[0]])
    return _probe(graph, threads, nodes, rows=_noise(1, rows, widths[0]))


def tower_attention_probe(tokens: int, heads: int, head_dim: int, threads: int) -> Probe:
    """Attention of every token to every other."""
    width = heads * head_dim
    graph = OperatorGraph()
    names = [graph.input(name, [1, tokens, width]) for name in ("queries", "keys", "values")]
    graph.output(
        graph.node("MultiHeadAttention", names, domain=CONTRIB, num_heads=heads),
        [1, tokens, width],
    )
    feeds = {name: _noise(1, tokens, width) for name in names}
    return _probe(graph, threads, 1, **feeds)


def cached_attention_probe(
    rows: int,
    past: int,
    heads: tuple[int, int],
    head_dim: int,
    threads: int,
    *,
    is_int8: bool,
    nodes: int,
) -> Probe:
    """Attention of `rows` rows to themselves and `past` rows in a cache that is written in place.

    Args:
        rows: New rows.
        past: Rows in the cache.
        heads: Heads of queries, and of keys and values.
        head_dim: Channels of a head.
        threads: Threads of the session.
        is_int8: Whether the cache holds int8 with one scale per channel.
        nodes: How many of them stand in the graph.
    """
    query_heads, kv_heads = heads
    width, kv_width = query_heads * head_dim, kv_heads * head_dim
    kind, dtype = (TensorProto.INT8, np.int8) if is_int8 else (TensorProto.FLOAT, np.float32)
    graph = OperatorGraph()
    joined = graph.input("joined", [1, rows, width + 2 * kv_width])
    before = graph.constant(np.array([past + rows - 1], np.int32))
    total = graph.constant(np.array(past + rows, np.int32))
    table = np.linspace(-1, 1, _CAPACITY * head_dim // 2, dtype=np.float32)
    angles = graph.constant(table.reshape(_CAPACITY, head_dim // 2))
    attributes: dict[str, Any] = {}
    extra: list[str] = []
    if is_int8:
        attributes = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        attributes["kv_cache_bit_width"] = 8
        scales = graph.constant(np.full((1, kv_heads, 1, head_dim), 0.02, np.float32))
        extra = ["", "", "", scales, scales]
    buffers = {}
    for index in range(nodes):
        for part in ("key", "value"):
            name = graph.input(f"past.{index}.{part}", [1, kv_heads, _CAPACITY, head_dim], kind)
            buffers[name] = np.zeros((1, kv_heads, _CAPACITY, head_dim), dtype)
        value, key_out, value_out = graph.nodes(
            "GroupQueryAttention",
            [
                joined,
                "",
                "",
                f"past.{index}.key",
                f"past.{index}.value",
                before,
                total,
                angles,
                angles,
                *extra,
            ],
            3,
            domain=CONTRIB,
            num_heads=query_heads,
            kv_num_heads=kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            **attributes,
        )
        graph.output(value, [1, rows, width])
        for name in (key_out, value_out):
            graph.output(name, [1, kv_heads, _CAPACITY, head_dim], kind)
    session = _session(graph, threads)
    binding = session.io_binding()
    held = _noise(1, rows, width + 2 * kv_width)
    binding.bind_ortvalue_input("joined", ort.OrtValue.ortvalue_from_numpy(held))
    outputs = iter(session.get_outputs())
    kept: list[npt.NDArray[Any]] = [held, *buffers.values()]
    for index in range(nodes):
        result = np.zeros((1, rows, width), np.float32)
        kept.append(result)
        binding.bind_ortvalue_output(next(outputs).name, ort.OrtValue.ortvalue_from_numpy(result))
        for part in ("key", "value"):
            cache = ort.OrtValue.ortvalue_from_numpy(buffers[f"past.{index}.{part}"])
            binding.bind_ortvalue_input(f"past.{index}.{part}", cache)
            binding.bind_ortvalue_output(next(outputs).name, cache)

    def run() -> object:
        session.run_with_iobinding(binding)
        return kept  # a binding keeps pointers, not arrays

    return Probe(run=run, nodes=nodes)


def activation_probe(kind: str, rows: int, width: int, threads: int) -> Probe:
    """An activation of every element."""
    operator, attributes = ACTIVATIONS[kind]
    graph = OperatorGraph()
    value = graph.input("rows", [1, rows, width])
    value = graph.node(operator, [value], domain=CONTRIB, **attributes)
    graph.output(value, [1, rows, width])
    return _probe(graph, threads, 1, rows=_noise(1, rows, width))


def norm_probe(rows: int, width: int, threads: int) -> Probe:
    """A norm with the sum before it."""
    graph = OperatorGraph()
    value = graph.input("rows", [1, rows, width])
    scale = graph.constant(np.ones(width, np.float32))
    total = graph.node("Add", [value, value])
    normed = graph.node("RMSNormalization", [total, scale], epsilon=1e-6)
    graph.output(normed, [1, rows, width])
    graph.output(total, [1, rows, width])
    return _probe(graph, threads, 1, rows=_noise(1, rows, width))


def copy_probe(rows: int, width: int, threads: int) -> Probe:
    """A product of every element with another."""
    graph = OperatorGraph()
    value = graph.input("rows", [1, rows, width])
    graph.output(graph.node("Mul", [value, value]), [1, rows, width])
    return _probe(graph, threads, 1, rows=_noise(1, rows, width))


def call_probe(width: int, threads: int) -> Probe:
    """A graph of one row and one node, whose arithmetic costs next to nothing."""
    graph = OperatorGraph()
    value = graph.input("rows", [1, 1, width])
    scale = graph.constant(np.ones(width, np.float32))
    graph.output(graph.node("RMSNormalization", [value, scale], epsilon=1e-6), [1, 1, width])
    return _probe(graph, threads, 1, rows=_noise(1, 1, width))


def _probe(
    graph: OperatorGraph, threads: int, nodes: int, **feeds: npt.NDArray[np.float32]
) -> Probe:
    session = _session(graph, threads)
    return Probe(run=lambda: session.run(None, feeds), nodes=nodes)


def _session(graph: OperatorGraph, threads: int) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    require_exact_sums(options)
    return ort.InferenceSession(
        graph.serialize(), sess_options=options, providers=["CPUExecutionProvider"]
    )


def _noise(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _streamed_bytes() -> int:
    """Bytes of weights that no cache holds."""
    return max(_LEAST_STREAMED_BYTES, _CACHE_SHARE * (last_level_cache_bytes() or 0))
