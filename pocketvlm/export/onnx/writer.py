"""Writes ONNX graphs node by node, all of their weights into one file that holds each once.

Building the graph directly instead of tracing it keeps every node, name and byte under control,
and takes milliseconds instead of the minutes that tracing hundreds of quantized layers costs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx
from onnx import TensorProto, helper

from pocketvlm.bundle import TensorSignature
from pocketvlm.errors import ExportError

__all__ = ["CONTRIB", "GraphWriter", "WeightFile"]

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

_IR_VERSION = 10
_INLINE_BYTES = 1024  # smaller constants stay in the graph, where they cost no padding
_PAGE = 4096  # large tensors are mapped from the file, and a mapping starts at a page
_DTYPES = {
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
}


class WeightFile:
    """The external data of all graphs of a bundle; equal bytes are stored once.

    A tied head and its embedding, in two graphs, so become two references to the same bytes.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = path.open("wb")
        self._places: dict[bytes, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()

    def store(self, data: memoryview) -> tuple[int, int]:
        """Appends the bytes, unless they are there already; returns offset and length."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._places:
            alignment = _PAGE if len(data) >= 16 * _PAGE else 64
            position = self._stream.tell()
            offset = -(-position // alignment) * alignment
            self._stream.write(b"\0" * (offset - position))
            self._stream.write(data)
            self._places[digest] = (offset, len(data))
        return self._places[digest]

    def flush(self) -> None:
        """Makes everything that was stored visible to readers of the file."""
        self._stream.flush()


class GraphWriter:
    """One graph under construction; values are their names.

    Args:
        name: Name of the graph.
        weights: Where large constants go.
        opset: Version of the standard operators.
    """

    def __init__(self, name: str, weights: WeightFile, *, opset: int) -> None:
        self.opset = opset
        self._name = name
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._names: dict[str, int] = {}

    def constant(self, name: str, array: np.ndarray, *, data_type: int | None = None) -> str:
        """A constant under exactly this name; it may be asked for again.

        Args:
            name: Name of the value.
            array: Its content.
            data_type: ONNX element type, where numpy has none of its own (bfloat16 as uint16).

        Raises:
            ValueError: The name has another content.
        """
        tensor = TensorProto()
        tensor.name = name
        tensor.data_type = data_type or helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor.dims.extend(array.shape)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        if len(data) < _INLINE_BYTES:
            tensor.raw_data = data.tobytes()
        else:
            offset, length = self._weights.store(data)
            tensor.data_location = TensorProto.EXTERNAL
            entries = {"location": self._weights.path.name, "offset": offset, "length": length}
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))
        if self._initializers.setdefault(name, tensor) != tensor:
            raise ValueError(f"constant {name} of graph {self._name} has two contents")
        return name

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        *,
        name: str,
        domain: str = "",
        output: str | None = None,
        **attributes: Any,
    ) -> str:
        """Adds a node of one output and returns the output's name.

        Args:
            operator: Its type.
            inputs: Values; an empty name leaves an optional input out.
            name: What it is, such as the layer; numbered where it is taken.
            domain: Domain of the operator.
            output: Name of the output; made from `name` if not given.
            attributes: Attributes of the node; those that are `None` are left out.
        """
        unique = self.unique(name)
        (value,) = self.nodes(
            operator, inputs, [output or unique], name=unique, domain=domain, **attributes
        )
        return value

    def nodes(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        name: str,
        domain: str = "",
        **attributes: Any,
    ) -> tuple[str, ...]:
        """Adds a node of named outputs; an empty name leaves an optional output out."""
        inputs = list(inputs)
        while inputs and not inputs[-1]:
            inputs.pop()
        kept = {key: value for key, value in attributes.items() if value is not None}
        self._nodes.append(
            helper.make_node(operator, inputs, outputs, name=name, domain=domain, **kept)
        )
        return tuple(outputs)

    def either(
        self, condition: str, then: Callable[[], str], otherwise: Callable[[], str], *, name: str
    ) -> str:
        """Adds a choice between two branches of one int64 output of one dimension.

        Args:
            condition: A bool of one element.
            then: Adds the nodes of the branch that is taken where it holds, and returns its output.
                They may read every value that was made before.
            otherwise: Likewise, where it does not.
            name: Name of the node and of the output.
        """
        return self.node(
            "If",
            [condition],
            name=name,
            then_branch=self._branch(then, f"{name}.then"),
            else_branch=self._branch(otherwise, f"{name}.else"),
        )

    def _branch(self, build: Callable[[], str], name: str) -> onnx.GraphProto:
        outside, self._nodes = self._nodes, []
        try:
            output = helper.make_tensor_value_info(build(), TensorProto.INT64, [None])
            return helper.make_graph(self._nodes, name, [], [output])
        finally:
            self._nodes = outside

    def unique(self, name: str) -> str:
        """The name, numbered if it was given before."""
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return f"{name}#{count}" if count else name

    def inline(
        self, model: onnx.ModelProto, inputs: Mapping[str, str], prefix: str
    ) -> tuple[str, ...]:
        """Copies the nodes of another model into this graph.

        Args:
            model: A model without functions and subgraphs, in this graph's opset.
            inputs: Values of this graph by the names of the model's inputs.
            prefix: Put before every other name.

        Returns:
            Values of the model's outputs, in order.
        """
        names = dict(inputs)

        def rename(value: str) -> str:
            return names.get(value, f"{prefix}.{value}") if value else ""

        for tensor in model.graph.initializer:
            self.constant(rename(tensor.name), onnx.numpy_helper.to_array(tensor))
        for node in model.graph.node:
            copy = onnx.NodeProto()
            copy.op_type, copy.domain = node.op_type, node.domain
            copy.name = f"{prefix}.{node.name}"
            copy.input.extend(rename(value) for value in node.input)
            copy.output.extend(rename(value) for value in node.output)
            copy.attribute.extend(node.attribute)
            self._nodes.append(copy)
        return tuple(rename(value.name) for value in model.graph.output)

    def save(
        self,
        path: Path,
        inputs: Sequence[TensorSignature],
        outputs: Sequence[TensorSignature],
    ) -> None:
        """Checks the graph and writes it; the weights are in the weight file already.

        Raises:
            ExportError: The graph is not valid ONNX; the message keeps the checker's words.
        """
        graph = helper.make_graph(
            self._nodes,
            self._name,
            [_value_info(signature) for signature in inputs],
            [_value_info(signature) for signature in outputs],
            initializer=list(self._initializers.values()),
        )
        model = helper.make_model(
            graph,
            ir_version=_IR_VERSION,
            opset_imports=[helper.make_opsetid("", self.opset), helper.make_opsetid(CONTRIB, 1)],
            producer_name="pocketvlm",
        )
        self._weights.flush()
        path.write_bytes(model.SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(path)
        except onnx.checker.ValidationError as error:
            first = str(error).strip().splitlines()[0]
            raise ExportError(f"{path.name}: is not valid ONNX: {first}") from error


def _value_info(signature: TensorSignature) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        signature.name, _DTYPES[signature.dtype], list(signature.shape)
    )
