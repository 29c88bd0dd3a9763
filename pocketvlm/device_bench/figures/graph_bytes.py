"""Bytes of weights in a bundle's graphs, counted in the files."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # no stubs

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError

__all__ = ["decoder_weight_bytes", "graph_file_bytes"]


def graph_file_bytes(bundle: Bundle, target: str) -> int:
    """Bytes of a target's graphs and their external data, each file once."""
    folders = {
        component.file.rpartition("/")[0]
        for component in bundle.manifest.components
        if component.target == target
    }
    return sum(
        (bundle.path / name).stat().st_size
        for name in bundle.manifest.files
        if name.rpartition("/")[0] in folders
    )


def decoder_weight_bytes(bundle: Bundle, target: str) -> int | None:
    """Bytes of the decoder's weights, all of which one step of generation reads.

    Returns:
        The bytes; `None` for a target whose files do not tell the parts of the model apart.

    Raises:
        BundleError: The graph cannot be read.
    """
    if target != "onnx":
        return None
    file = bundle.file(bundle.component(target, "decoder").file)
    try:
        model = onnx.load(file, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BundleError(f"{file}: not a readable ONNX graph: {error}") from error
    return sum(_stored_bytes(model.graph.initializer))


def _stored_bytes(initializers: Iterable[onnx.TensorProto]) -> Iterable[int]:
    for tensor in initializers:
        external = {entry.key: entry.value for entry in tensor.external_data}
        yield int(external["length"]) if "length" in external else tensor.ByteSize()
