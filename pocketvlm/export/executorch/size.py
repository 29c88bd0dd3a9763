"""Predicts the ExecuTorch program's bytes, and what it cannot run, from the specification alone."""

from __future__ import annotations

from collections.abc import Mapping

from pocketvlm.export.executorch.forms import explain_misfit, kernel_bits, needs_offsets
from pocketvlm.export.prediction import join_refusals, other_elements
from pocketvlm.export.sparse_container.size import masked_warnings, saved_bytes
from pocketvlm.export.sparse_container.unmasked import planned_unmasked
from pocketvlm.models.spec import LinearSpec, ModelSpec
from pocketvlm.stages import Prediction
from pocketvlm.weights.layout import AffineLayout, SparseLayout, WeightLayout

__all__ = ["layer_bytes", "predict_executorch"]

_FLOAT_BYTES = 4  # XNNPACK computes in float32 and stores what it computes with
_GROUP_SCALE_BYTES = 2  # of a blockwise kernel; one a row is float32
_DIGIT_BITS = 4
_TOWER_BLOCK_BYTES = 9_000
_DECODER_BLOCK_BYTES = 9_500
_GRAPH_BYTES = 30_000


def predict_executorch(
    spec: ModelSpec,
    forms: Mapping[LinearSpec, WeightLayout | None],
    *,
    sparse_file: bool = False,
) -> Prediction:
    """Bytes of the program by part, and the layers that no kernel can run.

    Args:
        spec: The model.
        forms: What each layer will be stored as; `None` for layers that stay float.
        sparse_file: Whether masked weights are packed in the file.
    """
    parts: dict[str, int] = {}
    unpacked = 0
    misfits: list[tuple[str, str]] = []
    dense: list[str] = []
    dearer: list[str] = []
    for linear, planned in forms.items():
        form = planned_unmasked(planned)
        shape = linear.out_features, linear.in_features
        count = layer_bytes(planned, shape, sparse_file=sparse_file)
        unpacked += layer_bytes(planned, shape) - count
        if isinstance(form, AffineLayout):
            reason = _misfit(spec, linear, form)
            if reason is not None:
                misfits.append((linear.name, reason))
            if linear.part == "embedding":
                count += _table_scale_bytes(linear, form) if spec.decoder.tied_head else 0
            if linear.part != "embedding" or spec.decoder.tied_head:
                is_row = form.group_size >= linear.in_features
                if form.float_zeros or needs_offsets(
                    bits=form.bits, is_row=is_row, symmetric=form.symmetric
                ):
                    dearer.append(linear.name)
        elif form is not None:
            dense.append(linear.name)
        parts[linear.part] = parts.get(linear.part, 0) + count
    parts["other"] = _other_bytes(spec)
    warnings = []
    if dearer:
        warnings.append(
            f"executorch: {len(dearer)} layers have free zero points, or 8 bits in groups: XNNPACK "
            "runs them exactly, at the price of a second product; symmetric: true, and 8 bits with "
            "one scale a row, would do without"
        )
    if dense:
        warnings.append(
            f"executorch: {len(dense)} layers of codebooks are stored as dense float32: XNNPACK "
            "has no kernel for them"
        )
    warnings += masked_warnings("executorch", "XNNPACK", forms.values(), sparse_file=sparse_file)
    return Prediction(
        part_bytes=parts,
        refused=join_refusals("executorch", misfits),
        warnings=tuple(warnings),
        unpacked_bytes=unpacked,
    )


def _misfit(spec: ModelSpec, linear: LinearSpec, form: AffineLayout) -> str | None:
    if linear.part == "embedding" and not spec.decoder.tied_head:
        return None  # a lookup takes any grid
    return explain_misfit(group_size=form.group_size, in_features=linear.in_features)


def layer_bytes(
    layout: WeightLayout | None, shape: tuple[int, int], *, sparse_file: bool = False
) -> int:
    """Bytes of one matrix [rows, columns] in the program, as a kernel stores it."""
    rows, columns = shape
    form = planned_unmasked(layout)
    if isinstance(form, AffineLayout):
        count = _affine_bytes(form, rows, columns)
    else:
        count = rows * columns * _FLOAT_BYTES
    if sparse_file and isinstance(layout, SparseLayout):
        count -= _saved_bytes(layout, shape)
    return count


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
    if form.float_zeros or needs_offsets(bits=form.bits, is_row=is_row, symmetric=form.symmetric):
        row += groups * _FLOAT_BYTES
    return rows * row


def _saved_bytes(form: SparseLayout, shape: tuple[int, int]) -> int:
    """What the packed file leaves out of a matrix."""
    plain = planned_unmasked(form)
    if not isinstance(plain, AffineLayout):
        return saved_bytes(form, shape, bits=_FLOAT_BYTES * 8)
    groups = -(-shape[1] // plain.group_size)
    bits = kernel_bits(plain.bits)
    # Narrower codes are stored around their zero point, which then is the same everywhere.
    has_fills = bits == plain.bits and not plain.symmetric
    if groups == 1:
        return saved_bytes(form, shape, bits=bits, has_fills=has_fills)
    return saved_bytes(
        form,
        shape,
        bits=_DIGIT_BITS,
        width=groups * plain.group_size,
        copies=bits // _DIGIT_BITS,
        has_fills=has_fills,
    )


def _table_scale_bytes(linear: LinearSpec, form: AffineLayout) -> int:
    """A tied table's codes are stored once; the lookup has scales of its own."""
    groups = -(-linear.in_features // form.group_size)
    return linear.out_features * groups * _FLOAT_BYTES


def _other_bytes(spec: ModelSpec) -> int:
    """Everything but weight matrices: patches, positions, norms, biases, graphs."""
    tower, decoder = spec.tower, spec.decoder
    embeddings, vectors = other_elements(spec)
    graphs = (
        _GRAPH_BYTES
        + _TOWER_BLOCK_BYTES * (tower.feature_block + 1)
        + _DECODER_BLOCK_BYTES * decoder.depth
    )
    return (embeddings + vectors) * _FLOAT_BYTES + graphs
