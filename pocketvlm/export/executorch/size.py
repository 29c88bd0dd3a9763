"""Counts the bytes of an ExecuTorch program from the specification alone."""

from __future__ import annotations

from collections.abc import Mapping

from pocketvlm.export.executorch.limits import kernel_bits, needs_offsets
from pocketvlm.export.prediction import angle_elements, other_elements
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.spec import ModelSpec
from pocketvlm.weights.layout import AffineLayout, WeightLayout, without_mask

__all__ = ["graph_bytes", "layer_bytes", "vision_bytes"]

_FLOAT_BYTES = 4  # XNNPACK computes in float32 and stores what it computes with
_GROUP_SCALE_BYTES = 2  # of a blockwise kernel; one per row is float32
_DIGIT_BITS = 4
_TOWER_BLOCK_BYTES = 9_000
_DECODER_BLOCK_BYTES = 9_500
_GRAPH_BYTES = 30_000
_VISION_BYTES = 12_000


def layer_bytes(layout: WeightLayout | None, shape: tuple[int, int]) -> int:
    """Bytes of one matrix [rows, columns] in the program, as a kernel stores it."""
    rows, columns = shape
    plain = without_mask(layout)
    if isinstance(plain, AffineLayout):
        return _affine_bytes(plain, rows, columns)
    return rows * columns * _FLOAT_BYTES


def graph_bytes(
    spec: ModelSpec, layouts: Mapping[LinearSpec, WeightLayout | None]
) -> dict[str, int]:
    """Bytes of the graphs and of everything that is not a weight matrix."""
    parts = {"other": _other_bytes(spec)}
    for linear, layout in layouts.items():
        plain = without_mask(layout)
        is_tied = linear.part == "embedding" and spec.decoder.tied_head
        if is_tied and isinstance(plain, AffineLayout):
            # A tied table's codes are stored once; the lookup has its own scales.
            groups = -(-linear.in_features // plain.group_size)
            parts["embedding"] = linear.out_features * groups * _FLOAT_BYTES
    return parts


def vision_bytes(spec: ModelSpec, *, is_new_size: bool) -> int:
    """Bytes of one more vision method, and of the constants that pictures of a new size need."""
    tower = spec.tower
    method = _VISION_BYTES + _TOWER_BLOCK_BYTES * (tower.feature_block + 1)
    if not is_new_size:
        return method
    positions = 0 if tower.position_embedding is None else tower.tokens * tower.hidden_size
    return method + (positions + angle_elements(spec)) * _FLOAT_BYTES


def _affine_bytes(form: AffineLayout, rows: int, columns: int) -> int:
    """Codes and scales as a kernel stores them."""
    groups = -(-columns // form.group_size)
    bits = kernel_bits(form.bits)
    is_row = groups == 1
    if is_row:
        row = -(-columns * bits // 8) + _FLOAT_BYTES
    else:
        digits = bits // _DIGIT_BITS
        row = groups * form.group_size * bits // 8 + groups * digits * _GROUP_SCALE_BYTES
    if needs_offsets(form, columns):
        row += groups * _FLOAT_BYTES
    return rows * row


def _other_bytes(spec: ModelSpec) -> int:
    """Everything but weight matrices: patches, positions, norms, biases, graphs."""
    tower, decoder = spec.tower, spec.decoder
    embeddings, vectors = other_elements(spec)
    graphs = (
        _GRAPH_BYTES
        + _TOWER_BLOCK_BYTES * (tower.feature_block + 1)
        + _DECODER_BLOCK_BYTES * decoder.depth
    )
    return (embeddings + vectors + angle_elements(spec)) * _FLOAT_BYTES + graphs
