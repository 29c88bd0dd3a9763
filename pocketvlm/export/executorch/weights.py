"""Puts affine weights into what XNNPACK's dynamically quantized kernels read, without a new code.

XNNPACK multiplies int8 activations with signed integers around zero: 4 bits with one scale per row
and group, or 4 and 8 bits with one scale per row. Any other grid of integers is a sum of such ones.
With digits d of 4 bits and group g,

    w = scale_g * (code - zero_g) = scale_g * (d0 + 16 d1 + offset_g),

where a code of up to 4 bits has one digit and one of 8 bits in groups has two. The products of the
digits are XNNPACK's; what the offsets add is one small float product of the inputs' group sums.
Symmetric grids of 4 bits, every grid of 2 and 3 bits, and symmetric rows of 8 bits have one
digit and no offset: these cost nothing beside their product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketvlm.weights.affine import AffineWeight

__all__ = [
    "IntegerMatrix",
    "integer_matrix",
    "scale_rounding",
    "signed_codes",
]

_NARROW = 4
_WIDE = 8
_HALF = 1 << (_NARROW - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class IntegerMatrix:
    """A weight as XNNPACK reads it: w = scale * (sum of 16**k * digits[k] + offset).

    Attributes:
        digits: int8 [rows, columns] each, padding of the last group included; the lowest first.
        scales: float32 [rows, groups].
        offsets: float32 [rows, groups], scale included; `None` where all are zero.
        bits: Width in which a digit is stored, 4 or 8.
        group_size: Columns that share a scale; all columns where a row has one.
        in_features: Columns without padding.
    """

    digits: tuple[Tensor, ...]
    scales: Tensor
    offsets: Tensor | None
    bits: int
    group_size: int
    in_features: int

    @property
    def is_row(self) -> bool:
        """Whether a row has one scale."""
        return self.scales.shape[1] == 1

    def dequantize(self) -> Tensor:
        """The dense matrix in float32."""
        grouped = torch.zeros(*self.scales.shape, self.group_size)
        for place, digit in enumerate(self.digits):
            grouped += digit.view(grouped.shape).to(torch.float32) * 16**place
        grouped *= self.scales[..., None]
        if self.offsets is not None:
            grouped += self.offsets[..., None]
        return grouped.view(self.scales.shape[0], -1)[:, : self.in_features]


def integer_matrix(form: AffineWeight) -> IntegerMatrix:
    """A weight as the kernels read it; of a layout that `limits.explain` does not refuse."""
    is_row = form.groups == 1
    columns = form.in_features if is_row else form.groups * form.group_size
    codes = form.codes()[:, :columns].to(torch.int16)
    zeros = form.zero_points().to(torch.float32)
    scales = form.scales.to(torch.float32)
    offsets: Tensor | None = None
    digits: tuple[Tensor, ...]
    if form.bits < _NARROW and not form.has_float_zeros:
        points = zeros.to(torch.int16).repeat_interleave(columns // form.groups, dim=1)
        digits = (codes - points,)
    elif form.bits == _WIDE and is_row:
        digits, offsets = (codes - (1 << (_WIDE - 1)),), (1 << (_WIDE - 1)) - zeros
    elif form.bits == _WIDE:
        digits = ((codes & 15) - _HALF, (codes >> _NARROW) - _HALF)
        offsets = _HALF + 16 * _HALF - zeros
    else:
        digits, offsets = (codes - _HALF,), _HALF - zeros
    if offsets is not None:
        offsets = None if not bool(offsets.any()) else offsets * scales
    return IntegerMatrix(
        digits=tuple(digit.to(torch.int8).contiguous() for digit in digits),
        scales=scales,
        offsets=offsets,
        bits=_WIDE if form.bits == _WIDE and is_row else _NARROW,
        group_size=columns // form.groups,
        in_features=form.in_features,
    )


def scale_rounding(matrix: IntegerMatrix) -> float:
    """Largest relative change of a scale where the kernel stores it.

    Blockwise kernels store bfloat16, which has fewer digits than the float16 of a form; a scale
    with eight binary digits loses nothing. One scale per row is stored in float32.
    """
    if matrix.is_row:
        return 0.0
    stored = matrix.scales.to(torch.bfloat16).to(torch.float32)
    return float(((stored - matrix.scales).abs() / matrix.scales).max())


def signed_codes(form: AffineWeight) -> tuple[Tensor, Tensor | None]:
    """Codes of a table as signed integers of their container's width, and their zero points.

    Returns:
        int8 [rows, groups * group_size], and int8 [rows, groups] or `None` where all are zero.
    """
    codes = form.codes().to(torch.int16)
    zeros = form.zero_points().to(torch.int16)
    if form.bits < _NARROW:
        signed = codes.view(*zeros.shape, -1) - zeros[..., None]
        return signed.to(torch.int8).view(codes.shape), None
    half = 1 << (form.bits - 1)
    points = None if form.zeros is None else (zeros - half).to(torch.int8)
    return (codes - half).to(torch.int8), points
