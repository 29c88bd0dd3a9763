"""Counts the bytes of Core ML packages from the specification alone."""

from __future__ import annotations

from collections.abc import Mapping

from pocketvlm.export.coreml.limits import Deployment, container_bits
from pocketvlm.export.coreml.positions import TABLE_ROWS
from pocketvlm.export.prediction import angle_elements
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.spec import ModelSpec
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, SparseLayout, WeightLayout

__all__ = ["graph_bytes", "layer_bytes", "vision_bytes"]

_RECORD = 64  # each array of the weight file has a record of this size and starts at a multiple
_BYTE = 8
_NIBBLE = 4
_HALF_BYTES = 2

# An operator takes 200 bytes with its names and types: measured, not derived.
_TOWER_BLOCK_BYTES = 12_000
_DECODER_BLOCK_BYTES = 19_700
_WIDE_CACHE_BYTES = 5_000  # of a block whose cache is put together from two numbers
_VISION_BYTES = 8_000
_FUNCTION_BYTES = 12_000
_CONSTEXPR_BYTES = 180
_LOOKUP_BYTES = 320
_SPARSE_BYTES = 110
_PAIR_BYTES = 560  # of an operator with two results, a mask and values


def graph_bytes(
    spec: ModelSpec,
    layouts: Mapping[LinearSpec, WeightLayout | None],
    *,
    deployment: Deployment,
    float_bytes: int,
    capacity: int,
) -> dict[str, int]:
    """Bytes of the graphs and of all that is not a weight matrix, within 3 % of all packages.

    Args:
        spec: The model.
        layouts: What each layer will be stored as; `None` for layers that stay float.
        deployment: The oldest system that has to read the packages.
        float_bytes: Of what the graphs compute in.
        capacity: Rows of the cache.
    """
    functions = 2 if deployment == "iOS18" else 1
    wide = (
        _WIDE_CACHE_BYTES * len(spec.decoder.attention_blocks) if float_bytes > _HALF_BYTES else 0
    )
    return {
        "other": _float_bytes(spec, float_bytes, capacity)
        + _VISION_BYTES
        + _TOWER_BLOCK_BYTES * (spec.tower.feature_block + 1)
        + _FUNCTION_BYTES * functions
        + functions * (_DECODER_BLOCK_BYTES * spec.decoder.depth + wide)
        + sum(
            _operator_bytes(layout) * (functions if linear.part == "decoder" else 1)
            for linear, layout in layouts.items()
        )
    }


def layer_bytes(
    form: WeightLayout | None,
    shape: tuple[int, int],
    *,
    deployment: Deployment,
    float_bytes: int,
) -> int:
    """Bytes of one matrix [rows, columns] in the weight file, of a layout that is not refused."""
    rows, columns = shape
    if form is None:
        return _stored(rows * columns * float_bytes)
    if isinstance(form, SparseLayout):
        return _sparse_bytes(form, rows, columns, deployment, float_bytes)
    if isinstance(form, AffineLayout):
        count = _stored(-(-rows * _grid_columns(form, columns) * form.bits // _BYTE))
        return count + _grid_bytes(form, rows, columns, float_bytes)
    bits = container_bits(form.index_bits, deployment)
    count = _stored(-(-(rows // form.vector_length) * columns * bits // _BYTE))
    return count + _table_bytes(form, rows, bits, float_bytes)


def vision_bytes(spec: ModelSpec, *, float_bytes: int, is_new_size: bool) -> int:
    """Bytes of one more vision function, and of the arrays that pictures of a new size need."""
    tower = spec.tower
    graph = _VISION_BYTES + _TOWER_BLOCK_BYTES * (tower.feature_block + 1)
    if not is_new_size:
        return graph
    positions = 0 if tower.position_embedding is None else tower.tokens * tower.hidden_size
    arrays = (positions, *[angle_elements(spec) // 2] * 2)
    return graph + sum(_stored(count * float_bytes) for count in arrays if count)


def _sparse_bytes(
    form: SparseLayout, rows: int, columns: int, deployment: Deployment, float_bytes: int
) -> int:
    kept, values = form.kept(rows, columns), form.values
    if values is None:
        return _stored(-(-rows * columns // _BYTE)) + _stored(kept * float_bytes)
    if isinstance(values, AffineLayout):
        count = _stored(-(-rows * _grid_columns(values, columns) // _BYTE))
        count += _stored(-(-kept * values.bits // _BYTE))
        return count + _grid_bytes(values, rows, columns, float_bytes)
    bits = container_bits(values.index_bits, deployment)
    count = _stored(-(-rows * columns // _BYTE)) + _stored(-(-kept * bits // _BYTE))
    return count + _table_bytes(values, rows, bits, float_bytes)


def _grid_columns(form: AffineLayout, columns: int) -> int:
    """Columns that are stored: whole groups, or the row where one group spans it."""
    groups = -(-columns // form.group_size)
    return columns if groups == 1 else groups * form.group_size


def _grid_bytes(form: AffineLayout, rows: int, columns: int, float_bytes: int) -> int:
    """Scales and zero points."""
    count = rows * -(-columns // form.group_size)
    stored = _stored(count * float_bytes)
    if form.symmetric:
        return stored
    if form.float_zeros:
        return stored + _stored(count * float_bytes)
    width = _NIBBLE if form.bits == _NIBBLE else _BYTE
    return stored + _stored(-(-count * width // _BYTE))


def _table_bytes(form: CodebookLayout, rows: int, bits: int, float_bytes: int) -> int:
    """Codebooks with as many entries as `bits` can name, and scales of rows."""
    stored = 0
    if form.owns_codebooks:
        values = form.row_groups * form.column_groups * form.vector_length << bits
        stored += _stored(values * float_bytes)
    if form.row_scales:
        stored += _stored(rows * float_bytes)
    return stored


def _stored(count: int) -> int:
    """Bytes of an array with its record and padding."""
    return _RECORD + -(-count // _RECORD) * _RECORD


def _operator_bytes(form: WeightLayout | None) -> int:
    """Bytes in the graph of what expands a weight."""
    if form is None:
        return 0
    if isinstance(form, SparseLayout):
        below = 0
        if isinstance(form.values, AffineLayout):
            below = 2 if form.values.bits < _NIBBLE else 1
        elif form.values is not None:
            below = 2 if form.values.row_scales else 1
        return _SPARSE_BYTES + below * _PAIR_BYTES
    if isinstance(form, AffineLayout):
        return _CONSTEXPR_BYTES + (_LOOKUP_BYTES if form.bits < _NIBBLE else 0)
    return _LOOKUP_BYTES + (_CONSTEXPR_BYTES if form.row_scales else 0)


def _float_bytes(spec: ModelSpec, float_bytes: int, capacity: int) -> int:
    """Bytes of every array but weight matrices: patches, positions, norms, biases, angles."""
    tower, decoder = spec.tower, spec.decoder
    patches = tower.tokens
    patch_weights = tower.channels * tower.patch_size**2
    values = [patch_weights * tower.hidden_size, patches * tower.hidden_size]
    values += [tower.hidden_size] * (int(tower.has_cls) + int(tower.has_patch_bias))
    for norm in spec.norms():
        # A layer norm has a weight and a bias; an RMS norm's weight is stored twice over.
        values += [norm.width, norm.width] if norm.has_bias else [2 * norm.width]
    values += [linear.out_features for linear in spec.linears() if linear.has_bias]
    for conv in decoder.convolutions.values():
        values += [decoder.hidden_size] * (conv.taps + int(conv.has_bias))
    # Layers without a bias share zeros by width; a tied head is one of them.
    values += {x.out_features for x in spec.linears() if not x.has_bias} | {decoder.vocab_size}
    angles = min(decoder.max_positions, max(TABLE_ROWS, capacity)) * decoder.head_dim // 2
    values += [angles, angles]
    values += [angle_elements(spec) // 2] * 2
    return sum(_stored(count * float_bytes) for count in values)
