"""Products with int8 weights of one scale per row, by ONNX Runtime's integer kernels.

All of a product is then summed in integers and scaled once, which is what makes it fast; groups of
columns would be scaled one by one. What enters is rounded to int8 as well, in one of two ways:

- of a *tile*, one scale and zero point for everything that enters, which the kernel finds itself.
  A call of the vision graph is one tile, so its answer depends on nothing else.
- of a *row*, a scale for each, around zero. The kernels have none of these, so nodes before and
  after divide each row by its largest magnitude and multiply by it. What a decoder computes of a
  row then does not depend on the rows beside it: a prompt may be fed in pieces, and one token of
  thousandfold magnitude, which many decoders have, does not cost the others their digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from pocketvlm.export.onnx.writer import CONTRIB, GraphWriter
from pocketvlm.weights.affine import AffineWeight

__all__ = [
    "RoundedOver",
    "byte_codes",
    "float_product",
    "integer_product",
    "narrow_rows",
    "row_product",
    "table_rows",
]

RoundedOver = Literal["tile", "row"]
"""Over what of its input a product rounds with one scale."""

_ZERO = 128
_LEVELS = 127
_LEAST = 1e-36  # a smaller magnitude has no inverse in float32


def byte_codes(forms: Sequence[AffineWeight]) -> np.ndarray:
    """The codes of weights as the kernels read them, around zero: int8 [rows, columns]."""
    codes = torch.cat([form.codes()[:, : form.in_features] for form in forms])
    return (codes.to(torch.int16) - _ZERO).to(torch.int8).numpy()


def integer_product(
    graph: GraphWriter,
    name: str,
    operands: tuple[str, str, str],
    bias: str | None,
    *,
    rounded_over: RoundedOver,
) -> str:
    """A product whose input is rounded to int8.

    Args:
        graph: Where the nodes go.
        name: The layer.
        operands: Inputs, float32 [1, n, columns]; codes, int8 [rows, columns]; scales, float32
            [rows].
        bias: float32 [rows], if there is one.
        rounded_over: Over what the input has one scale.
    """
    inputs, codes, scales = operands
    # Constant, so that it is turned and packed once, when a session starts.
    turned = graph.node("Transpose", [codes], name=f"{name}.turned", perm=[1, 0])
    if rounded_over == "tile":
        return graph.node(
            "DynamicQuantizeMatMul",
            [inputs, turned, scales, "", bias or ""],
            name=name,
            domain=CONTRIB,
        )
    return row_product(graph, name, (inputs, turned, scales), bias)


def row_product(
    graph: GraphWriter,
    name: str,
    operands: tuple[str, str, str],
    bias: str | None,
    *,
    is_made: bool = False,
) -> str:
    """A product that rounds each row of its input by itself.

    Args:
        graph: Where the nodes go.
        name: The layer.
        operands: Inputs, float32 [1, n, columns]; codes on their side, int8 [columns, rows];
            scales, float32 [rows].
        bias: float32 [rows], if there is one.
        is_made: Whether codes are not constant but what `narrow_rows` makes: uint8, around 128.
    """
    inputs, turned, scales = operands
    spread, largest = _spread(graph, name, inputs)
    one, zero = graph.constant("int8.unit", np.array(1, np.float32)), _zero(graph)
    rounded = graph.node("QuantizeLinear", [spread, one, zero], name=f"{name}.rounded")
    product = graph.node(
        "MatMulIntegerToFloat",
        [rounded, turned, _step(graph), scales, zero, *([zero] if is_made else [])],
        name=f"{name}.product",
        domain=CONTRIB,
    )
    product = graph.node("Mul", [product, largest], name=f"{name}.scaled" if bias else name)
    return product if bias is None else graph.node("Add", [product, bias], name=name)


def narrow_rows(graph: GraphWriter, name: str, dense: str, outputs: tuple[str, str]) -> None:
    """Rounds a matrix to 8 bits with one scale per row, as `row_product` takes what is made.

    Codes are uint8: x86 without VNNI adds products of int8 codes in pairs of 16 bits, and the
    setting against that (`runtime.onnx.engine.EXACT_SUMS`) turns constants alone into uint8.
    Everywhere else the kernels are equally fast for both.

    Args:
        graph: Where the nodes go.
        name: The layer.
        dense: The matrix, float32 [rows, columns].
        outputs: Names of the codes on their side, uint8 [columns, rows] around 128, and of the
            scales, float32 [rows].
    """
    spread, largest = _spread(graph, name, dense)
    one = graph.constant("int8.unit", np.array(1, np.float32))
    codes = graph.node("QuantizeLinear", [spread, one, _zero(graph)], name=f"{name}.narrow")
    graph.node("Transpose", [codes], name=f"{name}.turned", output=outputs[0], perm=[1, 0])
    scales = graph.node("Mul", [largest, _step(graph)], name=f"{name}.steps")
    flat = graph.constant("flat", np.array([-1], np.int64))
    graph.node("Reshape", [scales, flat], name=f"{name}.scales", output=outputs[1])


def float_product(graph: GraphWriter, name: str, operands: tuple[str, str, str]) -> str:
    """The same in float32, with a matrix that is expanded when a session starts.

    Not by DequantizeLinear: where the processor lacks VNNI, the setting against saturation
    (`runtime.onnx.engine.EXACT_SUMS`) makes its codes unsigned, and its zero point a single one.
    """
    inputs, codes, scales = operands
    dense = _expanded(graph, name, codes, scales, f"{name}.dense")
    return graph.node("FusedMatMul", [inputs, dense], name=name, domain=CONTRIB, transB=1)


def table_rows(graph: GraphWriter, name: str, codes: str, scales: str, ids: str) -> str:
    """Rows of a table, float32 [1, L, columns].

    Args:
        graph: Where the nodes go.
        name: The table.
        codes: int8 [rows, columns].
        scales: float32 [rows].
        ids: int64 [1, L]: which rows.
    """
    taken = graph.node("Gather", [codes, ids], name=f"{name}.taken")
    steps = graph.node("Gather", [scales, ids], name=f"{name}.steps")
    return _expanded(graph, name, taken, steps, name)


def _expanded(graph: GraphWriter, name: str, codes: str, scales: str, output: str) -> str:
    """Codes [..., columns] as floats, each row by its scale [...]."""
    wide = graph.node("Cast", [codes], name=f"{name}.float32", to=1)
    last = graph.constant("int8.last_axis", np.array([-1], np.int64))
    steps = graph.node("Unsqueeze", [scales, last], name=f"{name}.columns")
    return graph.node("Mul", [wide, steps], name=output)


def _spread(graph: GraphWriter, name: str, rows: str) -> tuple[str, str]:
    """Rows between -127 and 127, and the largest magnitude of each, [..., 1]."""
    magnitudes = graph.node("Abs", [rows], name=f"{name}.magnitudes")
    last = graph.constant("int8.last_axis", np.array([-1], np.int64))
    largest = graph.node("ReduceMax", [magnitudes, last], name=f"{name}.largest", keepdims=1)
    # A row of zeros has a number that divides it.
    least = graph.constant("int8.least", np.array(_LEAST, np.float32))
    largest = graph.node("Max", [largest, least], name=f"{name}.positive")
    levels = graph.constant("int8.levels", np.array(_LEVELS, np.float32))
    inverse = graph.node("Div", [levels, largest], name=f"{name}.inverse")
    return graph.node("Mul", [rows, inverse], name=f"{name}.spread"), largest


def _step(graph: GraphWriter) -> str:
    return graph.constant("int8.level", np.array(1 / _LEVELS, np.float32))


def _zero(graph: GraphWriter) -> str:
    return graph.constant("int8.zero", np.array(_ZERO, np.uint8))
