"""Expands weights that ONNX Runtime has no kernel for: small in the file, dense when they are used.

A matrix is expanded by standard operators whose inputs are all constant, so that ONNX Runtime
folds them once, when a session starts. Rows of a table are expanded as they are asked for, and the
table stays small in memory too. Either way the operations and their order in float32 are those of
`WeightForm.dequantize`, so the values are the same to the last bit.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from pocketvlm.export.onnx.weights import PackedWeight
from pocketvlm.export.onnx.writer import GraphWriter
from pocketvlm.weights.codebook import CodebookWeight, Lookup

__all__ = ["affine_rows", "codebook_matrix", "codebook_rows"]

_BYTE = 8


def codebook_matrix(graph: GraphWriter, name: str, form: CodebookWeight) -> str:
    """The dense matrix on its side, float32 [in_features, out_features], out of constants alone.

    Args:
        graph: Where the nodes go.
        name: The layer; constants and nodes are called after it.
        form: The weight.
    """
    return _expand(graph, name, form, None)


def codebook_rows(graph: GraphWriter, name: str, form: CodebookWeight, ids: str) -> str:
    """Rows of the dense matrix, float32 [1, L, in_features].

    Args:
        graph: Where the nodes go.
        name: The table.
        form: Its weight.
        ids: int64 [1, L]: which rows.
    """
    return _expand(graph, name, form, ids)


def affine_rows(
    graph: GraphWriter,
    name: str,
    packed: PackedWeight,
    ids: str,
) -> str:
    """Rows of an affine table, float32 [1, L, in_features], by standard operators alone.

    Args:
        graph: Where the nodes go.
        name: The table.
        packed: Its weight, whose bytes are shared by a head that is the same table.
        ids: int64 [1, L]: which rows.
    """
    groups = packed.scales.shape[1]
    width = groups * packed.block_size
    bytes_per_row = packed.codes[0].size
    codes = packed.codes.reshape(packed.out_features, bytes_per_row)
    stored = graph.constant(f"{name}.codes", codes)
    taken = graph.node("Gather", [stored, ids], name=f"{name}.taken")
    unpacked = _unpack(graph, name, taken, bytes_per_row, packed.bits, width, axis=-1)
    grouped = graph.constant(
        f"{name}.groups", np.array([1, -1, groups, packed.block_size], np.int64)
    )
    dense = graph.node("Reshape", [unpacked, grouped], name=f"{name}.by_group")
    dense = _float32(graph, f"{name}.by_group", dense)
    for operator, values in (
        ("Sub", _zeros_of_rows(graph, name, packed, ids)),
        ("Mul", _values_of_rows(graph, f"{name}.scales", packed.scales, ids)),
    ):
        dense = graph.node(operator, [dense, values], name=f"{name}.{operator.lower()}")
    flat = graph.constant(f"{name}.flat", np.array([1, -1, width], np.int64))
    dense = graph.node("Reshape", [dense, flat], name=f"{name}.padded")
    if width == packed.in_features:
        return dense
    bounds = [
        graph.constant(f"{name}.{field}", np.array([value], np.int64))
        for field, value in (("start", 0), ("end", packed.in_features), ("axis", -1))
    ]
    return graph.node("Slice", [dense, *bounds], name=f"{name}.unpadded")


def _zeros_of_rows(graph: GraphWriter, name: str, packed: PackedWeight, ids: str) -> str:
    """Zero points of rows, float32, one per group: [1, L, groups, 1], or one for all."""
    zeros = packed.zeros
    if zeros is None:
        default = np.array(2 ** (packed.bits - 1), np.float32)
        return graph.constant(f"{name}.default_zero", default)
    if zeros.dtype != np.uint8:
        return _values_of_rows(graph, f"{name}.zeros", zeros, ids)
    groups = packed.scales.shape[1]
    stored = graph.constant(f"{name}.zeros", zeros)
    taken = graph.node("Gather", [stored, ids], name=f"{name}.zeros_taken")
    label = f"{name}.zeros_of_rows"
    points = _unpack(graph, label, taken, zeros.shape[1], packed.bits, groups, axis=-1)
    column = graph.constant(f"{name}.zeros_shape", np.array([1, -1, groups, 1], np.int64))
    points = graph.node("Reshape", [points, column], name=f"{label}.by_group")
    return _float32(graph, label, points)


def _values_of_rows(graph: GraphWriter, name: str, values: np.ndarray, ids: str) -> str:
    """Values of rows, one per group, as float32 [1, L, groups, 1]."""
    stored = graph.constant(f"{name}_by_group", values[..., None])
    rows = graph.node("Gather", [stored, ids], name=f"{name}_of_rows")
    return _float32(graph, f"{name}_of_rows", rows)


def _matrix(graph: GraphWriter, name: str, lookup: Lookup) -> str:
    """A look-up as a matrix on its side, float32 [columns, rows].

    ONNX Runtime keeps every folded value until all are folded, so few steps and small types are
    what the peak of memory is made of. Upright, the vectors would have to be turned around.
    """
    row_groups, column_groups, entries, length = lookup.codebooks.shape
    vectors, count = lookup.packed.shape
    packed = graph.constant(f"{name}.indices", lookup.packed.numpy())
    packed = graph.node("Transpose", [packed], name=f"{name}.turned", perm=[1, 0])
    indices = _unpack(graph, name, packed, count, lookup.index_bits, lookup.columns, axis=0)
    indices = _offset_columns(graph, name, lookup, indices, axis=0)
    if row_groups > 1:
        starts = np.arange(row_groups, dtype=np.int32) * (column_groups * entries)
        first_entry = graph.constant(
            f"row_starts.{vectors}.{row_groups}.{column_groups * entries}",
            np.repeat(starts, vectors // row_groups),
        )
        indices = graph.node("Add", [indices, first_entry], name=f"{name}.of_row")
    values = graph.node("Gather", [_codebooks(graph, name, lookup), indices], name=f"{name}.found")
    if length > 1:
        shape = graph.constant(
            f"shape.{lookup.columns}x{lookup.rows}",
            np.array([lookup.columns, lookup.rows], np.int64),
        )
        values = graph.node("Reshape", [values, shape], name=f"{name}.matrix")
    return _float32(graph, f"{name}.matrix", values)


def _rows(graph: GraphWriter, name: str, lookup: Lookup, ids: str) -> str:
    """Rows of a look-up, float32 [1, L, columns]."""
    row_groups, column_groups, entries, length = lookup.codebooks.shape
    vectors, count = lookup.packed.shape

    def scalar(field: str, value: int) -> str:
        return graph.constant(f"{name}.{field}", np.array(value, np.int64))

    def beside_columns(field: str, values: str) -> str:
        column = graph.constant(f"{name}.column_shape", np.array([1, -1, 1], np.int64))
        values = graph.node("Reshape", [values, column], name=f"{name}.{field}_column")
        return graph.node("Cast", [values], name=f"{name}.{field}_int32", to=TensorProto.INT32)

    vector = graph.node("Div", [ids, scalar("length", length)], name=f"{name}.vector")
    stored = graph.constant(f"{name}.indices", lookup.packed.numpy())
    packed = graph.node("Gather", [stored, vector], name=f"{name}.taken")
    indices = _unpack(graph, name, packed, count, lookup.index_bits, lookup.columns, axis=-1)
    indices = _offset_columns(graph, name, lookup, indices, axis=-1)
    if row_groups > 1:
        group = graph.node(
            "Div", [vector, scalar("group_rows", vectors // row_groups)], name=f"{name}.group"
        )
        start = graph.node(
            "Mul", [group, scalar("group_entries", column_groups * entries)], name=f"{name}.start"
        )
        indices = graph.node(
            "Add", [indices, beside_columns("start", start)], name=f"{name}.of_row"
        )
    element = graph.node("Mod", [ids, scalar("length", length)], name=f"{name}.element")
    # One element of each vector: codebooks [centroids, length] are read as one row of elements.
    width = graph.constant(f"{name}.width", np.array(length, np.int32))
    indices = graph.node("Mul", [indices, width], name=f"{name}.first")
    indices = graph.node(
        "Add", [indices, beside_columns("element", element)], name=f"{name}.places"
    )
    flat = graph.constant(f"{name}.flat", np.array([-1], np.int64))
    table = graph.node("Reshape", [_codebooks(graph, name, lookup), flat], name=f"{name}.elements")
    values = graph.node("Gather", [table, indices], name=f"{name}.found")
    return _float32(graph, f"{name}.found", values)


def _expand(graph: GraphWriter, name: str, form: CodebookWeight, ids: str | None) -> str:
    """All rows, on their side, or some, step by step as `CodebookWeight.dequantize` does it."""
    axis = 0 if ids is None else -1  # along the columns of the weight

    def look_up(name: str, lookup: Lookup) -> str:
        if ids is None:
            return _matrix(graph, name, lookup)
        return _rows(graph, name, lookup, ids)

    dense = look_up(name, form.main)
    if form.residual is not None:
        residual = look_up(f"{name}.residual", form.residual)
        dense = graph.node("Add", [dense, residual], name=f"{name}.sum")
    if form.outliers is not None:
        outliers = look_up(f"{name}.outliers", form.outliers)
        dense = graph.node("Concat", [outliers, dense], name=f"{name}.joined", axis=axis)
    if form.order is not None:
        inverse = np.argsort(form.order.numpy()).astype(np.int32)
        order = graph.constant(f"{name}.order", inverse)
        dense = graph.node("Gather", [dense, order], name=f"{name}.ordered", axis=axis)
    if form.row_scales is not None:
        per_row = form.row_scales.numpy()
        scales = graph.constant(f"{name}.row_scales", _along(per_row, -1 - axis))
        if ids is not None:
            scales = graph.node("Gather", [scales, ids], name=f"{name}.scales_of_rows")
        scales = _float32(graph, f"{name}.row_scales", scales)
        dense = graph.node("Mul", [dense, scales], name=f"{name}.scaled")
    for field, operator, values in (
        ("column_scales", "Mul", form.column_scales),
        ("column_offsets", "Add", form.column_offsets),
    ):
        if values is not None:
            stored = graph.constant(f"{name}.{field}", _along(values.numpy(), axis))
            operand = _float32(graph, f"{name}.{field}", stored)
            dense = graph.node(operator, [dense, operand], name=f"{name}.by_{field}")
    return dense


def _codebooks(graph: GraphWriter, name: str, lookup: Lookup) -> str:
    """All centroids below each other, float16 [centroids, length]; a row where length is one."""
    length = lookup.vector_length
    shape = (-1,) if length == 1 else (-1, length)
    return graph.constant(f"{name}.codebooks", lookup.codebooks.numpy().reshape(shape))


def _offset_columns(
    graph: GraphWriter, name: str, lookup: Lookup, indices: str, *, axis: int
) -> str:
    """Adds to each index where the codebook of its group of columns begins."""
    _, column_groups, entries, _ = lookup.codebooks.shape
    if column_groups == 1:
        return indices
    starts = np.arange(lookup.columns) // lookup.group_columns * entries
    first_entry = graph.constant(
        f"column_starts.{lookup.columns}.{lookup.group_columns}.{entries}.{axis}",
        _along(starts.astype(np.int32), axis),
    )
    return graph.node("Add", [indices, first_entry], name=f"{name}.of_column")


def _unpack(
    graph: GraphWriter, name: str, packed: str, width: int, bits: int, count: int, *, axis: int
) -> str:
    """Codes out of bytes, int32, `count` of `width` along the axis, lowest bits first.

    A code begins at bit `place * bits` of its row and ends at most two bytes further. These bytes
    are put together, moved to the right, and masked.
    """
    # Layers of one shape share these constants: each is there once in a graph.
    label = f"unpack.{count}x{bits}.{axis}"
    starts = np.arange(count) * bits
    shifts = starts % _BYTE
    spread = int((shifts.max() + bits - 1) // _BYTE + 1)
    # Where a byte holds whole codes, there is no need of wider words.
    kind = np.uint8 if spread == 1 else np.uint32
    if spread > 1:
        packed = graph.node("Cast", [packed], name=f"{name}.words", to=TensorProto.UINT32)
    word = packed
    for step in range(spread):
        if bits == _BYTE:
            break
        # After the last byte of a row there is nothing that the mask would keep.
        places = np.minimum(starts // _BYTE + step, width - 1).astype(np.int32)
        index = graph.constant(f"{label}.places.{step}", places)
        taken = graph.node("Gather", [packed, index], name=f"{name}.byte.{step}", axis=axis)
        if step == 0:
            word = taken
            continue
        left = graph.constant(f"left.{step}", np.array(_BYTE * step, np.uint32))
        taken = graph.node("BitShift", [taken, left], name=f"{name}.moved.{step}", direction="LEFT")
        word = graph.node("BitwiseOr", [word, taken], name=f"{name}.word.{step}")
    if bits % _BYTE:
        right = graph.constant(f"{label}.right", _along(shifts.astype(kind), axis))
        word = graph.node("BitShift", [word, right], name=f"{name}.low", direction="RIGHT")
        mask = graph.constant(f"{label}.mask", np.array((1 << bits) - 1, kind))
        word = graph.node("BitwiseAnd", [word, mask], name=f"{name}.code")
    return graph.node("Cast", [word], name=f"{name}.int32", to=TensorProto.INT32)


def _along(values: np.ndarray, axis: int) -> np.ndarray:
    """Values [n] as they are broadcast along the first (0) or the last (-1) axis of a matrix."""
    return values[:, None] if axis == 0 else values


def _float32(graph: GraphWriter, name: str, values: str) -> str:
    return graph.node("Cast", [values], name=f"{name}_float32", to=TensorProto.FLOAT)
