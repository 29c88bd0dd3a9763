"""Predicts the ONNX target's bytes, and what it cannot run, from the specification alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pocketvlm.export.onnx.packing import (
    BLOCK_SIZES,
    FLOAT_ZERO_BITS,
    FLOAT_ZERO_REFUSAL,
    container_bits,
)
from pocketvlm.export.prediction import join_refusals, other_elements
from pocketvlm.export.sparse_container.size import masked_warnings, saved_bytes
from pocketvlm.export.sparse_container.unmasked import planned_unmasked
from pocketvlm.models.spec import LinearSpec, ModelSpec
from pocketvlm.stages import Prediction
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, SparseLayout, WeightLayout

__all__ = ["layer_bytes", "predict_onnx"]

_FLOAT_BYTES = 2  # a published checkpoint is bf16, which is stored exactly
_SCALE_BYTES = 2
_NARROW_KERNEL_BITS = 2
_BYTE = 8

# A node takes 160 bytes with its names, a block has a fixed set of nodes; a node that expands has
# longer names, and constants: measured, not derived.
_TOWER_BLOCK_BYTES = 7_900
_DECODER_BLOCK_BYTES = 6_400
_GRAPH_BYTES = 4_000
_NODE_BYTES = 310


def predict_onnx(
    spec: ModelSpec,
    grids: Mapping[LinearSpec, WeightLayout | None],
    *,
    sparse_file: bool = False,
) -> Prediction:
    """Bytes of the files by part, within 3 %, and the layers that no kernel can run.

    Args:
        spec: The model.
        grids: What each layer will be quantized to; `None` for layers that stay float.
        sparse_file: Whether masked weights are packed in the file.
    """
    parts: dict[str, int] = {}
    unpacked = 0
    for linear, grid in grids.items():
        shape = linear.out_features, linear.in_features
        count = layer_bytes(grid, shape, sparse_file=sparse_file)
        unpacked += layer_bytes(grid, shape) - count
        if isinstance(grid, CodebookLayout):
            count += _expanding_nodes(grid) * _NODE_BYTES
        parts[linear.part] = parts.get(linear.part, 0) + count
    parts["other"] = _other_bytes(spec)
    misfits = [
        (linear.name, reason) for linear, grid in grids.items() for reason in _refusals(grid)
    ]
    return Prediction(
        part_bytes=parts,
        refused=join_refusals("onnx", misfits),
        warnings=tuple(_warnings(grids, sparse_file=sparse_file)),
        unpacked_bytes=unpacked,
    )


def layer_bytes(
    layout: WeightLayout | None, shape: tuple[int, int], *, sparse_file: bool = False
) -> int:
    """Bytes of one matrix [rows, columns] in the files, without the nodes that read it."""
    rows, columns = shape
    if layout is None:
        return rows * columns * _FLOAT_BYTES
    if isinstance(layout, CodebookLayout):
        return layout.stored_bytes(rows, columns)
    if isinstance(layout, AffineLayout):
        return _affine_bytes(layout, rows, columns)
    plain = planned_unmasked(layout)
    if isinstance(plain, AffineLayout):
        count = _affine_bytes(plain, rows, columns)
        bits, groups = container_bits(plain.bits), -(-columns // plain.group_size)
        width, has_fills = groups * plain.group_size, not plain.symmetric
    else:
        element = _dense_bytes(layout)
        count = rows * columns * element
        bits, width, has_fills = element * _BYTE, columns, False
    if sparse_file:
        count -= saved_bytes(layout, shape, bits=bits, width=width, has_fills=has_fills)
    return count


def _affine_bytes(layout: AffineLayout, rows: int, columns: int) -> int:
    """Codes, scales and zero points as `MatMulNBits` stores them."""
    stored = container_bits(layout.bits)
    groups = -(-columns // layout.group_size)
    row = groups * layout.group_size * stored // 8 + groups * _SCALE_BYTES
    # The zero point that the operator assumes is the container's, not that of a narrower code.
    if layout.float_zeros:
        row += groups * _SCALE_BYTES
    elif not layout.symmetric or stored != layout.bits:
        row += -(-groups * stored // 8)
    return rows * row


def _refusals(grid: WeightLayout | None) -> Iterator[str]:
    """Why no kernel runs a layer, with what would work."""
    plain = planned_unmasked(grid)
    if not isinstance(plain, AffineLayout):
        return
    if plain.group_size not in BLOCK_SIZES:
        yield (
            f"group size {plain.group_size} has no ONNX Runtime kernel; allowed are "
            f"{', '.join(map(str, BLOCK_SIZES))}"
        )
    if plain.float_zeros and container_bits(plain.bits) not in FLOAT_ZERO_BITS:
        yield FLOAT_ZERO_REFUSAL


def _warnings(
    grids: Mapping[LinearSpec, WeightLayout | None], *, sparse_file: bool
) -> Iterator[str]:
    affine = [
        plain for plain in map(planned_unmasked, grids.values()) if isinstance(plain, AffineLayout)
    ]
    if widened := sum(container_bits(grid.bits) != grid.bits for grid in affine):
        yield (
            f"onnx: {widened} layers of 3 bits are stored in 4-bit containers: no kernel "
            "reads 3 bits, so they cost what 4 bits cost"
        )
    if narrow := sum(grid.bits == _NARROW_KERNEL_BITS for grid in affine):
        yield f"onnx: {narrow} layers of 2 bits are smaller, and slower than 4 bits on a CPU"
    if looked_up := sum(isinstance(grid, CodebookLayout) for grid in grids.values()):
        yield (
            f"onnx: {looked_up} layers of codebooks are small on disk and dense float32 once "
            "loaded: ONNX Runtime has no kernel for them"
        )
    if between := sum(grid.float_zeros for grid in affine):
        yield (
            f"onnx: {between} layers have float zero points, which ONNX Runtime multiplies in "
            "float32: slower than integer zero points"
        )
    yield from masked_warnings("onnx", "ONNX Runtime", grids.values(), sparse_file=sparse_file)


def _dense_bytes(form: SparseLayout) -> int:
    """Bytes of an element: a scaled value needs more digits than float16 has."""
    values = form.values
    is_scaled = isinstance(values, AffineLayout) or (values is not None and values.row_scales)
    return 2 * _FLOAT_BYTES if is_scaled else _FLOAT_BYTES


def _expanding_nodes(form: CodebookLayout) -> int:
    """Nodes that `codebook` expands a weight with."""
    grouped = [form.index_bits]
    nodes = 2 * form.row_scales + 4 * form.column_scales
    if form.residual_bits is not None:
        grouped.append(form.residual_bits)
        nodes += 1
    nodes += len(grouped) * (int(form.row_groups > 1) + int(form.column_groups > 1))
    lookups = grouped
    if form.outlier_columns:
        lookups = [*grouped, form.outlier_bits]
        nodes += 1
    if form.outlier_columns or form.column_groups > 1:
        nodes += 1
    for bits in lookups:
        # What turns, finds, reshapes and casts; then what takes codes out of their bytes.
        nodes += 4
        nodes += 1 if bits == _BYTE else 4 if _BYTE % bits == 0 else 8
    return nodes


def _other_bytes(spec: ModelSpec) -> int:
    """Bytes of everything but weight matrices: patches, positions, norms, biases, graphs."""
    tower, decoder = spec.tower, spec.decoder
    embeddings, vectors = other_elements(spec)
    graphs = (
        _GRAPH_BYTES
        + _TOWER_BLOCK_BYTES * (tower.feature_block + 1)
        + _DECODER_BLOCK_BYTES * decoder.depth
    )
    return embeddings * _FLOAT_BYTES + vectors * 4 + graphs
