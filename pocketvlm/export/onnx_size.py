"""Predicts the ONNX target's bytes, and what it cannot run, from the specification alone."""

from __future__ import annotations

from collections.abc import Mapping

from pocketvlm.export.onnx_packing import (
    BLOCK_SIZES,
    FLOAT_ZERO_BITS,
    FLOAT_ZERO_REFUSAL,
    container_bits,
)
from pocketvlm.export.prediction import Prediction, other_elements
from pocketvlm.modelspec import LinearSpec, ModelSpec
from pocketvlm.planned import PlannedAffine, PlannedCodebook, PlannedForm, PlannedSparse

__all__ = ["predict_onnx", "quantized_bytes"]

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


def predict_onnx(spec: ModelSpec, grids: Mapping[LinearSpec, PlannedForm | None]) -> Prediction:
    """Bytes of the files by part, within 3 %, and the layers that no kernel can run.

    Args:
        spec: The model.
        grids: What each layer will be quantized to; `None` for layers that stay float.
    """
    parts: dict[str, int] = {}
    refused: list[str] = []
    widened: list[str] = []
    narrow: list[str] = []
    looked_up: list[str] = []
    dense: list[str] = []
    between: list[str] = []
    for linear, grid in grids.items():
        if grid is None:
            count = linear.out_features * linear.in_features * _FLOAT_BYTES
        elif isinstance(grid, PlannedSparse):
            dense.append(linear.name)
            count = linear.out_features * linear.in_features * _dense_bytes(grid)
        elif isinstance(grid, PlannedCodebook):
            looked_up.append(linear.name)
            count = grid.stored_bytes(linear.out_features, linear.in_features)
            count += _expanding_nodes(grid) * _NODE_BYTES
        elif isinstance(grid, PlannedSparse):
            refused.append(
                f"onnx: {linear.name}: a sparse weight cannot be exported yet; affine codes, "
                "codebooks and floats can"
            )
            count = grid.stored_bytes(linear.out_features, linear.in_features)
        else:
            if grid.group_size not in BLOCK_SIZES:
                refused.append(
                    f"onnx: {linear.name}: group size {grid.group_size} has no ONNX Runtime "
                    f"kernel; allowed are {', '.join(map(str, BLOCK_SIZES))}"
                )
            if grid.float_zeros:
                between.append(linear.name)
                if container_bits(grid.bits) not in FLOAT_ZERO_BITS:
                    refused.append(f"onnx: {linear.name}: {FLOAT_ZERO_REFUSAL}")
            if container_bits(grid.bits) != grid.bits:
                widened.append(linear.name)
            if grid.bits == _NARROW_KERNEL_BITS:
                narrow.append(linear.name)
            count = quantized_bytes(
                linear,
                bits=grid.bits,
                group_size=grid.group_size,
                symmetric=grid.symmetric,
                float_zeros=grid.float_zeros,
            )
        parts[linear.part] = parts.get(linear.part, 0) + count
    parts["other"] = _other_bytes(spec)
    warnings = []
    if widened:
        warnings.append(
            f"onnx: {len(widened)} layers of 3 bits are stored in 4-bit containers: no kernel "
            "reads 3 bits, so they cost what 4 bits cost"
        )
    if narrow:
        warnings.append(
            f"onnx: {len(narrow)} layers of 2 bits are smaller, and slower than 4 bits on a CPU"
        )
    if looked_up:
        warnings.append(
            f"onnx: {len(looked_up)} layers of codebooks are small on disk and dense float32 once "
            "loaded: ONNX Runtime has no kernel for them"
        )
    if dense:
        warnings.append(
            f"onnx: {len(dense)} layers of sparse weights are stored dense, in the narrowest float "
            "that is exact: ONNX Runtime has no kernel for them"
        )
    if between:
        warnings.append(
            f"onnx: {len(between)} layers have float zero points, which ONNX Runtime multiplies in "
            "float32: slower than integer zero points"
        )
    return Prediction(part_bytes=parts, refused=tuple(refused), warnings=tuple(warnings))


def _dense_bytes(form: PlannedSparse) -> int:
    """Bytes of an element: a scaled value needs more digits than float16 has."""
    values = form.values
    is_scaled = isinstance(values, PlannedAffine) or (values is not None and values.row_scales)
    return 2 * _FLOAT_BYTES if is_scaled else _FLOAT_BYTES


def quantized_bytes(
    linear: LinearSpec, *, bits: int, group_size: int, symmetric: bool, float_zeros: bool = False
) -> int:
    """Bytes of one layer's codes, scales and zero points as `MatMulNBits` stores them."""
    stored = container_bits(bits)
    groups = -(-linear.in_features // group_size)
    row = groups * group_size * stored // 8 + groups * _SCALE_BYTES
    # The zero point that the operator assumes is the container's, not that of a narrower code.
    if float_zeros:
        row += groups * _SCALE_BYTES
    elif not symmetric or stored != bits:
        row += -(-groups * stored // 8)
    return linear.out_features * row


def _expanding_nodes(form: PlannedCodebook) -> int:
    """Nodes that `onnx_codebook` expands a weight with."""
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
