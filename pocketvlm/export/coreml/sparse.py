"""Puts sparse weights into Core ML's operators: a mask of bits, and what it keeps, row by row.

The last operator is always `constexpr_sparse_to_dense`. Kept floats are its operand. Kept integers
and indices are expanded below it by operators that know the mask and return it with the values:
`constexpr_sparse_blockwise_shift_scale` and `constexpr_lut_to_sparse`, one inside the other where
integers have 2 or 3 bits or the rows of a table scales.

The operator of iOS 17 has one packed mask for the whole matrix instead of one bit an element, and
nothing below it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pocketvlm.export.coreml.constexpr import (
    Codes,
    Constexpr,
    FloatArray,
    exact_floats,
    fill_table,
    offset_of,
    shifted_codes,
    steps_of,
)
from pocketvlm.export.coreml.limits import Deployment, container_bits
from pocketvlm.weights.bitpack import pack_codes
from pocketvlm.weights.layout import AffineLayout, CodebookLayout, SparseLayout
from pocketvlm.weights.nonzeros import AffineNonzeros, CodebookNonzeros
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["describe_sparse", "pack_sparse", "plan_of_sparse"]

_BYTE = 8
_NIBBLE = 4


def pack_sparse(
    form: SparseWeight, *, deployment: Deployment, float_type: type[np.floating]
) -> Constexpr:
    """A sparse weight as the package stores it; one that `explain_misfit` lets pass."""
    keeps = form.keeps().numpy().view(np.uint8)
    if deployment == "iOS17":
        return Constexpr(
            operator="constexpr_sparse_to_dense",
            operands={
                "nonzero_data": exact_floats(form.stored(), float_type),
                "mask": Codes(values=pack_codes(keeps.reshape(-1), 1), bits=_BYTE),
                "shape": np.array(form.shape, dtype=np.uint32),
            },
            shape=form.shape,
        )
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


def describe_sparse(form: SparseWeight) -> str:
    """How a weight is stored, in a few words for the manifest."""
    values = form.values
    label = "float16"
    if isinstance(values, AffineNonzeros):
        grid = "symmetric" if values.zeros is None else "asymmetric"
        label = f"int{values.bits} g{values.group_size} {grid}"
    elif isinstance(values, CodebookNonzeros):
        tables = values.codebooks.shape[0]
        label = f"lut of {values.index_bits}-bit indices of values, {tables} tables"
    return f"sparse {label}"


def plan_of_sparse(form: SparseWeight) -> SparseLayout:
    """The form's options, without its numbers."""
    values = form.values
    planned: AffineLayout | CodebookLayout | None = None
    if isinstance(values, AffineNonzeros):
        planned = AffineLayout(
            bits=values.bits,
            group_size=values.group_size,
            symmetric=values.zeros is None,
            float_zeros=values.has_float_zeros,
        )
    elif isinstance(values, CodebookNonzeros):
        planned = CodebookLayout(
            index_bits=values.index_bits,
            vector_length=1,
            row_groups=values.codebooks.shape[0],
            row_scales=values.row_scales is not None,
        )
    return SparseLayout(density=form.density, values=planned)


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
