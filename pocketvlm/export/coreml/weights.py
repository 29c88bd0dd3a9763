"""Puts weights into Core ML's `constexpr` operators, code by code.

A `constexpr` is a constant that the package stores compressed and the runtime expands. A weight
needs one operator or two, one inside the other:

- affine, 4 and 8 bits: `constexpr_blockwise_shift_scale` over the codes;
- affine, 2 and 3 bits, for which the operator has no type: the codes are indices into the table
  0, 1, 2, ..., whose output is what is shifted and scaled;
- codebooks: `constexpr_lut_to_dense`, and a shift-scale around it where rows have a scale;
- sparse: `constexpr_sparse_to_dense` around a mask of bits and what it keeps, row by row. Kept
  floats are its operand; kept integers and indices are expanded below it by operators that know the
  mask and return it with the values, `constexpr_sparse_blockwise_shift_scale` and
  `constexpr_lut_to_sparse`.

On a symmetric grid the implied zero point is taken off the codes, which become signed, so that no
offsets are stored. Nothing is rounded and nothing is quantized again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from pocketvlm.export.coreml.constexpr import (
    Codes,
    Constexpr,
    FloatArray,
    exact_floats,
    fill_table,
    narrow_float,
    offset_of,
    shifted_codes,
    steps_of,
)
from pocketvlm.export.coreml.limits import Deployment, container_bits
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.bitpack import pack_codes
from pocketvlm.weights.codebook import CodebookWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.nonzeros import AffineNonzeros, CodebookNonzeros
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["pack_weight"]

_BYTE = 8
_NIBBLE = 4


def pack_weight(
    name: str, form: WeightForm, *, deployment: Deployment, float_type: type[np.floating]
) -> Constexpr | FloatArray:
    """A weight as the package stores it.

    Args:
        name: The layer, for the message.
        form: Its weight, of a layout that `limits.explain` does not refuse.
        deployment: The oldest system that has to read it.
        float_type: What it expands to, and how scales and floats are stored.

    Returns:
        The operator, or the array of a dense weight.

    Raises:
        UnsupportedError: A value is too large for float16.
    """
    is_old = deployment == "iOS17"
    if isinstance(form, SparseWeight):
        return (_pack_flat_sparse if is_old else _pack_sparse)(form, float_type)
    if isinstance(form, AffineWeight):
        return (_pack_affine_by_row if is_old else _pack_affine)(form, float_type)
    if isinstance(form, CodebookWeight):
        return (_pack_table if is_old else _pack_codebook)(form, float_type)
    return narrow_float(name, form.dequantize(), float_type)


def _pack_affine(form: AffineWeight, float_type: type[np.floating]) -> Constexpr:
    codes, columns = _stored_codes(form)
    shape = (form.shape[0], columns)
    operands: dict[str, Codes | FloatArray | Constexpr] = {
        "data": _data(codes, form, shape),
        "scale": exact_floats(form.scales, float_type),
    }
    if form.zeros is not None:
        operands["offset"] = offset_of(form.zeros, form.bits, float_type)
    return Constexpr(operator="constexpr_blockwise_shift_scale", operands=operands, shape=shape)


def _data(
    codes: npt.NDArray[np.uint8], form: AffineWeight, shape: tuple[int, int]
) -> Codes | Constexpr:
    """Codes that can be shifted and scaled: as they are, or looked up in 0, 1, 2, ..."""
    symmetric = form.zeros is None
    if form.bits in (_NIBBLE, _BYTE):
        return shifted_codes(codes, form.bits, symmetric=symmetric)
    return Constexpr(
        operator="constexpr_lut_to_dense",
        operands={
            "indices": Codes(values=codes, bits=form.bits),
            "lut": steps_of(form.bits, symmetric=symmetric),
        },
        shape=shape,
    )


def _stored_codes(form: AffineWeight) -> tuple[npt.NDArray[np.uint8], int]:
    """Codes and their columns: whole groups, or the row where one group spans it."""
    codes = form.codes().numpy()
    columns = form.in_features if form.groups == 1 else codes.shape[1]
    return np.ascontiguousarray(codes[:, :columns]), columns


def _pack_affine_by_row(form: AffineWeight, float_type: type[np.floating]) -> Constexpr:
    codes, columns = _stored_codes(form)
    zeros = form.zero_points()[:, 0]
    return Constexpr(
        operator="constexpr_affine_dequantize",
        operands={
            "quantized_data": Codes(values=codes, bits=_BYTE),
            "zero_point": (
                zeros.to(torch.float32).numpy()
                if form.has_float_zeros
                else Codes(values=zeros.numpy(), bits=_BYTE)
            ),
            "scale": exact_floats(form.scales[:, 0], float_type),
            "axis": 0,
        },
        shape=(form.shape[0], columns),
    )


def _pack_codebook(form: CodebookWeight, float_type: type[np.floating]) -> Constexpr:
    main = form.main
    bits = container_bits(main.index_bits, "iOS18")
    operands: dict[str, Codes | FloatArray | int] = {
        "indices": Codes(values=main.indices().to(torch.uint8).numpy(), bits=bits),
        "lut": exact_floats(fill_table(main.codebooks, bits), float_type),
    }
    if main.vector_length > 1:
        operands["vector_axis"] = 0
    looked_up = Constexpr(operator="constexpr_lut_to_dense", operands=operands, shape=form.shape)
    if form.row_scales is None:
        return looked_up
    return Constexpr(
        operator="constexpr_blockwise_shift_scale",
        operands={"data": looked_up, "scale": exact_floats(form.row_scales[:, None], float_type)},
        shape=form.shape,
    )


def _pack_table(form: CodebookWeight, float_type: type[np.floating]) -> Constexpr:
    main = form.main
    bits = container_bits(main.index_bits, "iOS17")
    indices = main.indices().to(torch.uint8).numpy()
    return Constexpr(
        operator="constexpr_lut_to_dense",
        operands={
            # The older operator packs its indices itself, over the ends of rows.
            "indices": Codes(values=pack_codes(indices.reshape(-1), bits), bits=_BYTE),
            "lut": exact_floats(fill_table(main.codebooks, bits).reshape(-1), float_type),
            "shape": np.array(form.shape, dtype=np.uint32),
        },
        shape=form.shape,
    )


def _pack_flat_sparse(form: SparseWeight, float_type: type[np.floating]) -> Constexpr:
    """The operator of iOS 17: one packed mask for the whole matrix, and floats alone."""
    keeps = form.keeps().numpy().view(np.uint8)
    return Constexpr(
        operator="constexpr_sparse_to_dense",
        operands={
            "nonzero_data": exact_floats(form.stored(), float_type),
            "mask": Codes(values=pack_codes(keeps.reshape(-1), 1), bits=_BYTE),
            "shape": np.array(form.shape, dtype=np.uint32),
        },
        shape=form.shape,
    )


def _pack_sparse(form: SparseWeight, float_type: type[np.floating]) -> Constexpr:
    keeps = form.keeps().numpy().view(np.uint8)
    values = form.values
    if isinstance(values, AffineNonzeros):
        return _densify(_pack_integers(form, values, keeps, float_type))
    if isinstance(values, CodebookNonzeros):
        return _densify(_pack_indices(form, values, keeps, float_type))
    return Constexpr(
        operator="constexpr_sparse_to_dense",
        operands={
            "nonzero_data": exact_floats(form.stored(), float_type),
            "mask": Codes(values=keeps, bits=1),
        },
        shape=form.shape,
    )


def _pack_integers(
    form: SparseWeight,
    values: AffineNonzeros,
    keeps: npt.NDArray[np.uint8],
    float_type: type[np.floating],
) -> Constexpr:
    rows, groups = values.scales.shape
    # Groups must divide the columns: padding is masked. One group is the row, whatever its size.
    columns = form.in_features if groups == 1 else groups * values.group_size
    mask = Codes(values=np.pad(keeps, ((0, 0), (0, columns - form.in_features))), bits=1)
    codes = form.stored().numpy()
    symmetric = values.zeros is None
    operands: dict[str, Codes | FloatArray] = {"scale": exact_floats(values.scales, float_type)}
    if values.zeros is not None:
        operands["offset"] = offset_of(values.zeros, values.bits, float_type)
    source = None
    if values.bits in (_NIBBLE, _BYTE):
        operands["data_mask"] = mask
        operands["nonzero_data"] = shifted_codes(codes, values.bits, symmetric=symmetric)
    else:
        source = Constexpr(
            operator="constexpr_lut_to_sparse",
            operands={
                "indices_mask": mask,
                "indices_nonzero_data": Codes(values=codes, bits=values.bits),
                "lut": steps_of(values.bits, symmetric=symmetric),
            },
            shape=(rows, columns),
        )
    return Constexpr(
        operator="constexpr_sparse_blockwise_shift_scale",
        operands=operands,
        shape=(rows, columns),
        source=source,
    )


def _pack_indices(
    form: SparseWeight,
    values: CodebookNonzeros,
    keeps: npt.NDArray[np.uint8],
    float_type: type[np.floating],
) -> Constexpr:
    bits = container_bits(values.index_bits, "iOS18")
    looked_up = Constexpr(
        operator="constexpr_lut_to_sparse",
        operands={
            "indices_mask": Codes(values=keeps, bits=1),
            "indices_nonzero_data": Codes(values=form.stored().numpy(), bits=bits),
            "lut": exact_floats(fill_table(values.codebooks, bits), float_type),
        },
        shape=form.shape,
    )
    if values.row_scales is None:
        return looked_up
    return Constexpr(
        operator="constexpr_sparse_blockwise_shift_scale",
        operands={"scale": exact_floats(values.row_scales[:, None], float_type)},
        shape=form.shape,
        source=looked_up,
    )


def _densify(source: Constexpr) -> Constexpr:
    return Constexpr(
        operator="constexpr_sparse_to_dense", operands={}, shape=source.shape, source=source
    )
