"""ONNX graphs of one operator each, as bundles have them: what a calibration times.

A graph is a chain: every node reads what the one before it wrote, so that a run of the graph costs
its nodes one after another, as in a decoder, and one call. Weights are random, since the speed of
dense products does not depend on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper

__all__ = ["CONTRIB", "OperatorGraph", "ProductShape"]

CONTRIB = "com.microsoft"
_OPSET = 23
_IR_VERSION = 10
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class ProductShape:
    """A weight matrix.

    Attributes:
        rows: Output channels.
        columns: Input channels.
    """

    rows: int
    columns: int

    @property
    def elements(self) -> int:
        """Weights."""
        return self.rows * self.columns


@dataclass(kw_only=True, eq=False)
class OperatorGraph:
    """A graph under construction; values are their names.

    Attributes:
        weight_bytes: Bytes that its products hold, codes, scales and zero points.
    """

    weight_bytes: int = 0
    _nodes: list[onnx.NodeProto] = field(default_factory=list)
    _constants: list[TensorProto] = field(default_factory=list)
    _inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    _outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    _random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(_SEED))

    def input(self, name: str, shape: Sequence[int], kind: int = TensorProto.FLOAT) -> str:
        """An input of a fixed shape."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def constant(self, array: np.ndarray) -> str:
        """A constant."""
        name = f"constant.{len(self._constants)}"
        tensor = TensorProto(name=name, dims=array.shape, raw_data=array.tobytes())
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        self._constants.append(tensor)
        return name

    def node(
        self, operator: str, inputs: Sequence[str], *, domain: str = "", **attributes: object
    ) -> str:
        """A node of one output."""
        return self.nodes(operator, inputs, 1, domain=domain, **attributes)[0]

    def nodes(
        self,
        operator: str,
        inputs: Sequence[str],
        count: int,
        *,
        domain: str = "",
        **attributes: object,
    ) -> list[str]:
        """A node of several outputs."""
        names = [f"value.{len(self._nodes)}.{index}" for index in range(count)]
        self._nodes.append(
            helper.make_node(operator, list(inputs), names, domain=domain, **attributes)
        )
        return names

    def dense_product(self, inputs: str, shape: ProductShape) -> str:
        """A float32 product, as `FusedMatMul` of a matrix that lies [rows, columns]."""
        weight = self._random.standard_normal((shape.rows, shape.columns), np.float32)
        self.weight_bytes += weight.nbytes
        weight *= shape.columns**-0.5
        return self.node("FusedMatMul", [inputs, self.constant(weight)], domain=CONTRIB, transB=1)

    def byte_product(self, inputs: str, shape: ProductShape) -> str:
        """A product with int8 codes that have one scale per row."""
        codes = self._random.integers(-127, 128, (shape.columns, shape.rows), dtype=np.int8)
        scales = np.full(shape.rows, shape.columns**-0.5 / 2**7, np.float32)
        self.weight_bytes += codes.nbytes + scales.nbytes // 2
        return self.node(
            "DynamicQuantizeMatMul",
            [inputs, self.constant(codes), self.constant(scales)],
            domain=CONTRIB,
        )

    def quantized_product(
        self, inputs: str, shape: ProductShape, *, bits: int, group_size: int, accuracy_level: int
    ) -> str:
        """A product with codes of `bits` bits, `group_size` columns to a scale and a zero point."""
        groups = -(-shape.columns // group_size)
        codes = self._random.integers(
            0, 256, (shape.rows, groups, group_size * bits // 8), dtype=np.uint8
        )
        scales = np.full((shape.rows, groups), shape.columns**-0.5 / 2**bits, np.float32)
        zeros = self._random.integers(0, 256, (shape.rows, -(-groups * bits // 8)), dtype=np.uint8)
        # Files hold scales as float16; the kernel reads the float32 that a session makes of them.
        self.weight_bytes += codes.nbytes + zeros.nbytes + scales.nbytes // 2
        return self.node(
            "MatMulNBits",
            [inputs, self.constant(codes), self.constant(scales), self.constant(zeros)],
            domain=CONTRIB,
            K=shape.columns,
            N=shape.rows,
            bits=bits,
            block_size=group_size,
            accuracy_level=accuracy_level,
        )

    def output(self, value: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> None:
        """Makes a value an output."""
        self._outputs.append(helper.make_tensor_value_info(value, kind, list(shape)))

    def serialize(self) -> bytes:
        """The model."""
        graph = helper.make_graph(
            self._nodes, "calibration", self._inputs, self._outputs, self._constants
        )
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
        return model.SerializeToString()
