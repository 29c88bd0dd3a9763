"""Puts weight forms into Core ML's `constexpr` operators, code by code, and back.

A `constexpr` is a constant that the package stores compressed and the runtime expands. What a form
needs is one operator or two, one inside the other:

- affine, 4 and 8 bits: `constexpr_blockwise_shift_scale` over the codes;
- affine, 2 and 3 bits, for which the operator has no type: the codes are indices into the table
  0, 1, 2, ..., whose output is what is shifted and scaled;
- codebooks: `constexpr_lut_to_dense`, and a shift-scale around it where rows have a scale;
- sparse: see `sparse`.

On a symmetric grid the implied zero point is taken off the codes, which become signed, so that no
offsets are stored. Nothing is rounded and nothing is quantized again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from pocketvlm.errors import UnsupportedError
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
from pocketvlm.export.coreml.limits import Deployment, container_bits, explain_misfit
from pocketvlm.export.coreml.sparse import describe_sparse, pack_sparse, plan_of_sparse
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.bitpack import pack_codes
from pocketvlm.weights.codebook import CodebookWeight
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, WeightLayout
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["describe_form", "pack_form"]

_BYTE = 8
_NIBBLE = 4


def pack_form(
    name: str, form: WeightForm, *, deployment: Deployment, float_type: type[np.floating]
) -> Constexpr | FloatArray:
    """A weight as the package stores it.

    Args:
        name: The layer, for the message.
        form: Its weight.
        deployment: The oldest system that has to read it.
        float_type: What it expands to, and how scales and floats are stored.

    Returns:
        The operator, or the array of a dense weight.

    Raises:
        UnsupportedError: There is no operator for it, or a value is too large for float16.
    """
    if isinstance(form, DenseWeight):
        return narrow_float(name, form.values, float_type)
    if not isinstance(form, AffineWeight | CodebookWeight | SparseWeight):
        raise UnsupportedError(
            f"{name}: a weight of kind {form.kind!r} cannot be exported to Core ML; there are "
            f"{AffineWeight.kind}, {CodebookWeight.kind}, {DenseWeight.kind}, {SparseWeight.kind}"
        )
    planned = _plan_of(form)
    reason = explain_misfit(planned, *form.shape, deployment)
    if reason is not None:
        raise UnsupportedError(f"{name}: {reason}")
    if isinstance(form, SparseWeight):
        return pack_sparse(form, deployment=deployment, float_type=float_type)
    if isinstance(form, AffineWeight):
        if deployment == "iOS17":
            return _pack_affine_by_row(form, float_type)
        return _pack_affine(form, float_type)
    if form.order is not None:
        raise UnsupportedError(
            f"{name}: Core ML's look-up has no place for columns in another order; their natural "
            "order would work"
        )
    if deployment == "iOS17":
        return _pack_table(form, float_type)
    return _pack_codebook(form, float_type)


def describe_form(form: WeightForm) -> str:
    """How a weight is stored, in a few words for the manifest."""
    if isinstance(form, AffineWeight):
        grid = "symmetric" if form.zeros is None else "asymmetric"
        return f"int{form.bits} g{form.group_size} {grid}"
    if isinstance(form, CodebookWeight):
        main = form.main
        length, bits = main.vector_length, main.index_bits
        return f"lut {bits}-bit indices of vectors of {length}, {main.codebooks.shape[0]} tables"
    if isinstance(form, SparseWeight):
        return describe_sparse(form)
    return "float"


def _plan_of(form: AffineWeight | CodebookWeight | SparseWeight) -> WeightLayout:
    """The form's options, without its numbers."""
    if isinstance(form, SparseWeight):
        return plan_of_sparse(form)
    if isinstance(form, AffineWeight):
        return AffineLayout(
            bits=form.bits,
            group_size=form.group_size,
            symmetric=form.zeros is None,
            float_zeros=form.has_float_zeros,
        )
    main, residual = form.main, form.residual
    return CodebookLayout(
        index_bits=main.index_bits,
        vector_length=main.vector_length,
        row_groups=main.codebooks.shape[0],
        column_groups=main.codebooks.shape[1],
        residual_bits=None if residual is None else residual.index_bits,
        outlier_columns=0 if form.outliers is None else form.outliers.columns,
        row_scales=form.row_scales is not None,
        column_scales=form.column_scales is not None or form.column_offsets is not None,
    )


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
