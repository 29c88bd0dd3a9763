"""What the files of a target need of the runtime that opens them, read from these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

import onnx
from packaging.version import Version

from pocketvlm.bundle.manifest import Component, RuntimeNeeds
from pocketvlm.emulation.mil.package import MilPackage
from pocketvlm.emulation.mil.systems import LOWEST_SYSTEMS
from pocketvlm.errors import ExportError
from pocketvlm.runtime.onnx.versions import (
    FLOAT_ZEROS_2BIT_VERSION,
    INT8_CACHE_VERSION,
    LOWEST_ONNX_VERSION,
)
from pocketvlm.runtime.sparse_file import expanded_path, plain_path

__all__ = ["read_needs"]

_IDENTIFIER = slice(4, 8)  # of a flatbuffer: `ET12`
_STANDARD = {"", "ai.onnx"}


def read_needs(target: str, folder: Path, components: Sequence[Component]) -> RuntimeNeeds:
    """What a runtime must be to read a target's files as they are meant.

    Args:
        target: The target.
        folder: The bundle.
        components: Its graphs; those of other targets are passed over.
    """
    return _READERS[target](folder, [each for each in components if each.target == target])


def _read_onnx(folder: Path, components: Sequence[Component]) -> RuntimeNeeds:
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
            for node in model.graph.node
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


def _read_executorch(folder: Path, components: Sequence[Component]) -> RuntimeNeeds:
    component = components[0]
    packed = component.sparse_file
    opened = (
        plain_path(folder / component.file) if packed is None else expanded_path(folder / packed)
    )
    with ExitStack() as stack:
        program, _ = stack.enter_context(opened)
        with program.open("rb") as stream:
            identifier = stream.read(8)[_IDENTIFIER]
    if identifier[:2] != b"ET":
        raise ExportError(f"{folder / component.file}: is no ExecuTorch program")
    # A runtime reads programs of its own version and older ones.
    return RuntimeNeeds(
        runtime="ExecuTorch",
        lowest_version=metadata.version("executorch").partition("+")[0],
        formats={"program": int(identifier[2:])},
    )


def _read_coreml(folder: Path, components: Sequence[Component]) -> RuntimeNeeds:
    files = sorted({component.file for component in components})
    version = max(MilPackage.open(folder / file).specification_version for file in files)
    return RuntimeNeeds(
        runtime="iOS",
        lowest_version=LOWEST_SYSTEMS[version].ios,
        formats={"specification": version},
    )


_READERS: Mapping[str, Callable[[Path, Sequence[Component]], RuntimeNeeds]] = {
    "onnx": _read_onnx,
    "executorch": _read_executorch,
    "coreml": _read_coreml,
}
