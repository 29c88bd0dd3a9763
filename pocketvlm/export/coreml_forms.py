"""Puts weight forms into Core ML's `constexpr` operators, code by code, and back.

A `constexpr` is a constant that the package stores compressed and the runtime expands. What a form
needs is one operator or two, one inside the other:

- affine, 4 and 8 bits: `constexpr_blockwise_shift_scale` over the codes;
- affine, 2 and 3 bits, for which the operator has no type: the codes are indices into the table
  0, 1, 2, ..., whose output is what is shifted and scaled;
- codebooks: `constexpr_lut_to_dense`, and a shift-scale around it where rows have a scale.

On a symmetric grid the implied zero point is taken off the codes, which become signed, so that no
offsets are stored. Nothing is rounded and nothing is quantized again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pocketvlm.errors import UnsupportedError
from pocketvlm.export.coreml_limits import Deployment, container_bits, explain_misfit
from pocketvlm.planned import PlannedAffine, PlannedCodebook, PlannedForm
from pocketvlm.weights import AffineWeight, CodebookWeight, DenseWeight, WeightForm, pack_codes

__all__ = [
    "Codes",
    "Constexpr",
    "FloatArray",
    "describe_form",
    "narrow_float",
    "pack_form",
]

FloatArray = npt.NDArray[np.float16] | npt.NDArray[np.float32]

_BYTE = 8
_NIBBLE = 4
_FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """Integers of a few bits.

    Attributes:
        values: uint8 or int8, one code an element.
        bits: Width in the package.
    """

    values: npt.NDArray[np.uint8] | npt.NDArray[np.int8]
    bits: int

    @property
    def is_signed(self) -> bool:
        """Whether codes lie around zero."""
        return self.values.dtype == np.int8


@dataclass(frozen=True, kw_only=True, eq=False)
class Constexpr:
    """An operator whose operands are constants, or other operators of this kind.

    Attributes:
        operator: Its name in the format.
        operands: By the name of the parameter; plain numbers stay numbers.
        shape: Of what it expands to; columns that pad the last group are included.
    """

    operator: str
    operands: Mapping[str, Codes | FloatArray | npt.NDArray[np.uint32] | int | Constexpr]
    shape: tuple[int, int]


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
    if not isinstance(form, AffineWeight | CodebookWeight):
        raise UnsupportedError(
            f"{name}: a weight of kind {form.kind!r} cannot be exported to Core ML; there are "
            f"{AffineWeight.kind}, {CodebookWeight.kind}, {DenseWeight.kind}"
        )
    planned = _plan_of(form)
    reason = explain_misfit(planned, *form.shape, deployment)
    if reason is not None:
        raise UnsupportedError(f"{name}: {reason}")
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


def narrow_float(name: str, values: Tensor, float_type: type[np.floating]) -> FloatArray:
    """Float values in the type that the graph computes in.

    Raises:
        UnsupportedError: A value is beyond what float16 can hold.
    """
    wide = values.detach().to(torch.float32)
    if float_type is np.float32:
        return wide.contiguous().numpy()
    largest = float(wide.abs().max()) if wide.numel() else 0.0
    if largest > _FLOAT16_MAX:
        raise UnsupportedError(
            f"{name}: has a value of {largest:.4g}, and float16 ends at {_FLOAT16_MAX:.0f}; "
            "precision: float32 would work"
        )
    return wide.to(torch.float16).contiguous().numpy()


def describe_form(form: WeightForm) -> str:
    """How a weight is stored, in a few words for the manifest."""
    if isinstance(form, AffineWeight):
        grid = "symmetric" if form.zeros is None else "asymmetric"
        return f"int{form.bits} g{form.group_size} {grid}"
    if isinstance(form, CodebookWeight):
        main = form.main
        length, bits = main.vector_length, main.index_bits
        return f"lut {bits}-bit indices of vectors of {length}, {main.codebooks.shape[0]} tables"
    return "float"


def _plan_of(form: AffineWeight | CodebookWeight) -> PlannedForm:
    """The form's options, without its numbers."""
    if isinstance(form, AffineWeight):
        return PlannedAffine(
            bits=form.bits,
            group_size=form.group_size,
            symmetric=form.zeros is None,
            float_zeros=form.has_float_zeros,
        )
    main, residual = form.main, form.residual
    return PlannedCodebook(
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
        "scale": _floats(form.scales, float_type),
    }
    if form.zeros is not None:
        if form.has_float_zeros:
            operands["offset"] = _floats(form.zeros, float_type)
        else:
            # Offsets have the type of the data: that of the table where codes are looked up.
            width = _NIBBLE if form.bits == _NIBBLE else _BYTE
            operands["offset"] = Codes(values=form.zeros.numpy(), bits=width)
    return Constexpr(operator="constexpr_blockwise_shift_scale", operands=operands, shape=shape)


def _data(
    codes: npt.NDArray[np.uint8], form: AffineWeight, shape: tuple[int, int]
) -> Codes | Constexpr:
    """Codes that can be shifted and scaled: as they are, or looked up in 0, 1, 2, ..."""
    middle = 1 << (form.bits - 1)
    if form.bits in (_NIBBLE, _BYTE):
        if form.zeros is None:
            signed = (codes.astype(np.int16) - middle).astype(np.int8)
            return Codes(values=signed, bits=form.bits)
        return Codes(values=codes, bits=form.bits)
    table = np.arange(1 << form.bits, dtype=np.uint8)
    steps = (table.astype(np.int8) - np.int8(middle)) if form.zeros is None else table
    return Constexpr(
        operator="constexpr_lut_to_dense",
        operands={
            "indices": Codes(values=codes, bits=form.bits),
            "lut": Codes(values=steps.reshape(1, 1, -1, 1), bits=_BYTE),
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
            "scale": _floats(form.scales[:, 0], float_type),
            "axis": 0,
        },
        shape=(form.shape[0], columns),
    )


def _pack_codebook(form: CodebookWeight, float_type: type[np.floating]) -> Constexpr:
    main = form.main
    bits = container_bits(main.index_bits, "iOS18")
    operands: dict[str, Codes | FloatArray | int] = {
        "indices": Codes(values=main.indices().to(torch.uint8).numpy(), bits=bits),
        "lut": _floats(_fill_table(main.codebooks, bits), float_type),
    }
    if main.vector_length > 1:
        operands["vector_axis"] = 0
    looked_up = Constexpr(operator="constexpr_lut_to_dense", operands=operands, shape=form.shape)
    if form.row_scales is None:
        return looked_up
    return Constexpr(
        operator="constexpr_blockwise_shift_scale",
        operands={"data": looked_up, "scale": _floats(form.row_scales[:, None], float_type)},
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
            "lut": _floats(_fill_table(main.codebooks, bits).reshape(-1), float_type),
            "shape": np.array(form.shape, dtype=np.uint32),
        },
        shape=form.shape,
    )


def _fill_table(codebooks: Tensor, bits: int) -> Tensor:
    """Codebooks with as many entries as an index can name; what is added is never named."""
    groups, columns, entries, length = codebooks.shape
    missing = (1 << bits) - entries
    if not missing:
        return codebooks
    filler = torch.zeros(groups, columns, missing, length, dtype=codebooks.dtype)
    return torch.cat([codebooks, filler], dim=2)


def _floats(values: Tensor, float_type: type[np.floating]) -> FloatArray:
    """Values that float16 holds exactly, in either type."""
    wide = values.to(torch.float16 if float_type is np.float16 else torch.float32)
    return wide.contiguous().numpy()
