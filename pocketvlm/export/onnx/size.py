"""Counts the bytes of the ONNX target's files from the specification alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from pocketvlm.export.onnx.limits import container_bits
from pocketvlm.export.prediction import angle_elements, other_elements
from pocketvlm.models.folds import Multiply, ScaleRows
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.spec import ModelSpec
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, SparseLayout, WeightLayout

__all__ = ["graph_bytes", "layer_bytes", "vision_bytes"]

_FLOAT_BYTES = 2  # a published checkpoint is bf16, which is stored exactly
_WIDE_BYTES = 4
_SCALE_BYTES = 2
_BYTE = 8
_POWER_OF_TWO = 0.5
"""The mantissa of a factor that changes exponents alone."""

# A node takes 160 bytes with its names, a block has a fixed set of nodes; a node that expands has
# longer names, and constants: measured, not derived.
_TOWER_BLOCK_BYTES = 7_900
_DECODER_BLOCK_BYTES = 6_400
_PREFILL_BLOCK_BYTES = 21_000  # both graphs
_GRAPH_BYTES = 4_000
_NODE_BYTES = 310


def layer_bytes(layout: WeightLayout | None, shape: tuple[int, int]) -> int:
    """Bytes of one matrix [rows, columns] in the files, without the nodes that read it."""
    rows, columns = shape
    if layout is None:
        return rows * columns * _FLOAT_BYTES
    if isinstance(layout, CodebookLayout):
        return layout.stored_bytes(rows, columns)
    if isinstance(layout, AffineLayout):
        return _affine_bytes(layout, rows, columns)
    plain = layout.without_mask
    if plain is not None:
        return _affine_bytes(plain, rows, columns)
    return rows * columns * (_WIDE_BYTES if _is_scaled(layout) else _FLOAT_BYTES)


def graph_bytes(
    spec: ModelSpec,
    layouts: Mapping[LinearSpec, WeightLayout | None],
    *,
    has_prefill: bool = False,
) -> dict[str, int]:
    """Bytes of the graphs and of all that is not a weight matrix, within 3 % of all files."""
    parts = Counter({"other": _other_bytes(spec)})
    if has_prefill:
        # Of the last block, both graphs have what comes before its attention.
        parts["other"] += 2 * _GRAPH_BYTES + _PREFILL_BLOCK_BYTES * (spec.decoder.depth - 1)
    # What a fold multiplied is not bf16 any more, and stays float32.
    products = {
        fold.target
        for fold in spec.folds
        if isinstance(fold, ScaleRows)
        or (isinstance(fold, Multiply) and abs(math.frexp(fold.factor)[0]) != _POWER_OF_TWO)
    }
    for linear, layout in layouts.items():
        if isinstance(layout, CodebookLayout):
            parts[linear.part] += _expanding_nodes(layout) * _NODE_BYTES
        elif layout is None and f"{linear.name}.weight" in products:
            rows, columns = linear.shape
            parts[linear.part] += rows * columns * (_WIDE_BYTES - _FLOAT_BYTES)
    return dict(parts)


def vision_bytes(spec: ModelSpec, *, is_new_size: bool) -> int:
    """Bytes of one more vision graph, and of the constants that pictures of a new size need."""
    tower = spec.tower
    graph = _GRAPH_BYTES + _TOWER_BLOCK_BYTES * (tower.feature_block + 1)
    if not is_new_size:
        return graph
    positions = 0 if tower.position_embedding is None else tower.tokens * tower.hidden_size
    return graph + (positions + angle_elements(spec) // 2) * _WIDE_BYTES


def _affine_bytes(layout: AffineLayout, rows: int, columns: int) -> int:
    """Codes, scales and zero points as the kernels read them."""
    if layout.has_byte_rows(columns):
        return rows * (columns + _SCALE_BYTES)
    stored = container_bits(layout.bits)
    groups = -(-columns // layout.group_size)
    row = groups * layout.group_size * stored // 8 + groups * _SCALE_BYTES
    # The zero point that the operator assumes is the container's, not that of a narrower code.
    if layout.float_zeros:
        row += groups * _SCALE_BYTES
    elif not layout.symmetric or stored != layout.bits:
        row += -(-groups * stored // 8)
    return rows * row


def _is_scaled(layout: SparseLayout) -> bool:
    """Whether values are products with a scale, which need more digits than float16 has."""
    values = layout.values
    return isinstance(values, AffineLayout) or (values is not None and values.row_scales)


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
    # The operator takes an angle once for both channels of a pair.
    angles = angle_elements(spec) // 2 * _WIDE_BYTES
    return embeddings * _FLOAT_BYTES + vectors * _WIDE_BYTES + angles + graphs
