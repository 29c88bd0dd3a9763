"""Puts weight forms into what XNNPACK's dynamically quantized kernels read, and back.

XNNPACK multiplies int8 activations with signed integers around zero: 4 bits with one scale a row
and group, or 4 and 8 bits with one scale a row. A form fits where every `code - zero` is such an
integer. That is any symmetric grid, and every grid of 2 or 3 bits, whose differences four bits
hold; the values stay what they are. What does not fit is refused with what would: nothing is
quantized again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketvlm.errors import UnsupportedError
from pocketvlm.weights import AffineWeight

__all__ = [
    "GROUP_MULTIPLE",
    "IntegerMatrix",
    "explain_misfit",
    "integer_matrix",
    "kernel_bits",
    "scale_rounding",
    "signed_codes",
]

GROUP_MULTIPLE = 32
"""Sizes of a group that the blockwise kernels take are multiples of this."""

_NARROW = 4
_WIDE = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class IntegerMatrix:
    """A weight as XNNPACK reads it: w = scale * code.

    Attributes:
        codes: int8 [rows, columns], padding of the last group included.
        scales: float32 [rows, groups], or [rows] where a row has one scale.
        bits: Width of the stored code, 4 or 8.
        group_size: Columns that share a scale; 0 where a row has one.
        in_features: Columns without padding.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int
    in_features: int

    def dequantize(self) -> Tensor:
        """The dense matrix in float32."""
        scales = self.scales if self.scales.ndim > 1 else self.scales[:, None]
        grouped = self.codes.view(*scales.shape, -1).to(torch.float32) * scales[..., None]
        return grouped.reshape(self.codes.shape[0], -1)[:, : self.in_features]


def kernel_bits(bits: int) -> int:
    """Bits in which XNNPACK stores a code of `bits` bits."""
    return _NARROW if bits <= _NARROW else _WIDE


def explain_misfit(*, bits: int, group_size: int, symmetric: bool, in_features: int) -> str | None:
    """Why no kernel runs a grid, and what would work; `None` where one does.

    Args:
        bits: Width of a code.
        group_size: Columns that share a scale.
        symmetric: Whether the zero point is fixed.
        in_features: Columns of the matrix.
    """
    if not symmetric and bits >= _NARROW:
        return (
            f"{bits} bits with free zero points have no XNNPACK kernel; symmetric: true would "
            "work, or fewer bits"
        )
    if group_size >= in_features:
        return None
    if bits == _WIDE:
        return (
            f"8 bits in groups of {group_size} have no XNNPACK kernel; group_size: row would "
            "work, one scale a row, or 4 bits"
        )
    if group_size % GROUP_MULTIPLE:
        return (
            f"group size {group_size} has no XNNPACK kernel; allowed are multiples of "
            f"{GROUP_MULTIPLE}, or row for one scale a row"
        )
    return None


def integer_matrix(name: str, form: AffineWeight) -> IntegerMatrix:
    """Puts a weight into the layout of a kernel.

    Args:
        name: The layer, for the message.
        form: Its weight.

    Raises:
        UnsupportedError: No kernel takes the form.
    """
    if form.has_float_zeros:
        raise UnsupportedError(
            f"{name}: zero points between codes have no XNNPACK kernel; symmetric: true would work"
        )
    reason = explain_misfit(
        bits=form.bits,
        group_size=form.group_size,
        symmetric=form.zeros is None,
        in_features=form.in_features,
    )
    if reason is not None:
        raise UnsupportedError(f"{name}: {reason}")
    is_row = form.group_size >= form.in_features
    columns = form.in_features if is_row else form.groups * form.group_size
    scales = form.scales.to(torch.float32)
    return IntegerMatrix(
        codes=_without_zeros(form)[:, :columns].contiguous(),
        scales=scales[:, 0].contiguous() if is_row else scales,
        bits=kernel_bits(form.bits),
        group_size=0 if is_row else form.group_size,
        in_features=form.in_features,
    )


def scale_rounding(matrix: IntegerMatrix) -> float:
    """Largest relative change of a scale where the kernel stores it, in bfloat16 or float32.

    Blockwise kernels store bfloat16, which has fewer digits than the float16 of a form. Grids
    whose scales have eight binary digits, as this project's quantizers make them, lose nothing.
    """
    if not matrix.group_size:
        return 0.0
    stored = matrix.scales.to(torch.bfloat16).to(torch.float32)
    return float(((stored - matrix.scales).abs() / matrix.scales).max())


def signed_codes(form: AffineWeight) -> tuple[Tensor, Tensor | None]:
    """Codes as signed integers of the container's width, and their zero points.

    Returns:
        int8 [rows, groups * group_size], and int8 [rows, groups] or `None` where all are zero.
    """
    if form.zeros is None or kernel_bits(form.bits) != form.bits:
        return _without_zeros(form), None
    half = 1 << (form.bits - 1)
    codes = (form.codes().to(torch.int16) - half).to(torch.int8)
    return codes, (form.zero_points().to(torch.int16) - half).to(torch.int8)


def _without_zeros(form: AffineWeight) -> Tensor:
    """`code - zero` of every weight, int8 [rows, groups * group_size]."""
    codes = form.codes().view(*form.scales.shape, -1).to(torch.int16)
    signed = codes - form.zero_points().to(torch.int16)[..., None]
    return signed.to(torch.int8).view(codes.shape[0], -1)
