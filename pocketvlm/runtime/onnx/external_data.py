"""Which other files an ONNX graph reads: the locations of its external data.

ONNX Runtime opens whatever location a graph names; versions that are supported differ in what they
refuse, and one spelling stands for an address in memory. So every location must be the name of a
signed file of the bundle before the runtime sees the graph. Numbers of fields are those of the
public onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError
from pocketvlm.files.protobuf import Message

__all__ = ["require_signed_data"]

_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_GRAPH_NODES, _GRAPH_INITIALIZERS, _GRAPH_SPARSE = 1, 5, 15
_FUNCTION_NODES = 7
_NODE_ATTRIBUTES = 5
_ATTRIBUTE_TENSORS = (5, 10)
_ATTRIBUTE_GRAPHS = (6, 11)
_ATTRIBUTE_SPARSE = (22, 23)
_SPARSE_TENSORS = (1, 2)
_TRAINING_GRAPHS = (1, 2)
_TENSOR_EXTERNAL = 13


def require_signed_data(bundle: Bundle, name: str) -> None:
    """Refuses a graph whose weights are anywhere but in signed files of the bundle.

    Args:
        bundle: The bundle.
        name: The graph's file.

    Raises:
        BundleError: A location is another one, or the file is not an ONNX graph.
    """
    file = bundle.file(name)
    folder = name.rpartition("/")[0]
    try:
        # Mapped, as weights may lie in the graph itself.
        locations = set(_locations(Message(np.memmap(file, np.uint8, mode="r").data)))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{file}: ONNX Runtime cannot load it: {error}") from error
    for location in sorted(locations):
        data = f"{folder}/{location}" if folder else location
        if not bundle.has(data):
            raise BundleError(
                f"{file}: has weights at {location!r}, which is not a signed file of the bundle"
            )
        bundle.file(data)


def _locations(model: Message) -> Iterator[str]:
    for graph in model.messages(_MODEL_GRAPH):
        yield from _graph_locations(graph)
    for training in model.messages(_MODEL_TRAINING):
        for field in _TRAINING_GRAPHS:
            for graph in training.messages(field):
                yield from _graph_locations(graph)
    for function in model.messages(_MODEL_FUNCTIONS):
        yield from _node_locations(function.messages(_FUNCTION_NODES))


def _graph_locations(graph: Message) -> Iterator[str]:
    yield from _tensor_locations(graph.messages(_GRAPH_INITIALIZERS))
    yield from _sparse_locations(graph.messages(_GRAPH_SPARSE))
    yield from _node_locations(graph.messages(_GRAPH_NODES))


def _node_locations(nodes: list[Message]) -> Iterator[str]:
    for node in nodes:
        for attribute in node.messages(_NODE_ATTRIBUTES):
            for field in _ATTRIBUTE_TENSORS:
                yield from _tensor_locations(attribute.messages(field))
            for field in _ATTRIBUTE_SPARSE:
                yield from _sparse_locations(attribute.messages(field))
            for field in _ATTRIBUTE_GRAPHS:
                for graph in attribute.messages(field):
                    yield from _graph_locations(graph)


def _sparse_locations(tensors: list[Message]) -> Iterator[str]:
    for tensor in tensors:
        for field in _SPARSE_TENSORS:
            yield from _tensor_locations(tensor.messages(field))


def _tensor_locations(tensors: list[Message]) -> Iterator[str]:
    for tensor in tensors:
        for entry in tensor.messages(_TENSOR_EXTERNAL):
            if entry.text(1) == "location":
                yield entry.text(2)
