"""What the files of the ONNX target need of the runtime that opens them, read from these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from packaging.version import Version

from pocketvlm.bundle.manifest import Component, RuntimeNeeds
from pocketvlm.runtime.onnx.versions import (
    FLOAT_ZEROS_2BIT_VERSION,
    INT8_CACHE_VERSION,
    LOWEST_ONNX_VERSION,
)

__all__ = ["read_needs"]

_STANDARD = {"", "ai.onnx"}


def read_needs(folder: Path, components: Sequence[Component]) -> RuntimeNeeds:
    """Opsets and operators of the graphs, and the lowest version of ONNX Runtime for them."""
    formats: dict[str, int] = {}
    operators: set[str] = set()
    needed = {LOWEST_ONNX_VERSION}
    for component in components:
        model = onnx.load(folder / component.file, load_external_data=False)
        named = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
        for name, version in {**named, "ir": model.ir_version}.items():
            formats[name] = max(version, formats.get(name, 0))
        operators |= {
            f"{node.domain}.{node.op_type}"
            for node in _nodes(model.graph)
            if node.domain not in _STANDARD
        }
        if any(_float_zeros_of_two_bits(model.graph)):
            needed.add(FLOAT_ZEROS_2BIT_VERSION)
        if any(_keeps_int8_cache(node) for node in model.graph.node):
            needed.add(INT8_CACHE_VERSION)
    return RuntimeNeeds(
        runtime="ONNX Runtime",
        lowest_version=max(needed, key=Version),
        formats=dict(sorted(formats.items())),
        operators=tuple(sorted(operators)),
    )


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes of a graph, and of the branches in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _keeps_int8_cache(node: onnx.NodeProto) -> bool:
    return node.op_type == "GroupQueryAttention" and any(
        each.name == "k_quant_type" and each.s != b"NONE" for each in node.attribute
    )


def _float_zeros_of_two_bits(graph: onnx.GraphProto) -> Iterator[bool]:
    """Of each 2-bit product, whether its zero points are floats: computed, or stored as such."""
    integers = {
        tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.UINT8
    }
    for node in graph.node:
        if node.op_type == "MatMulNBits" and len(node.input) > 3:  # noqa: PLR2004  (its zero points)
            bits = next(each.i for each in node.attribute if each.name == "bits")
            zeros = node.input[3]
            yield bits == 2 and zeros != "" and zeros not in integers  # noqa: PLR2004  (bits)
