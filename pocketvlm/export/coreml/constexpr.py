"""What a package stores of a weight: codes, floats, and the operators that expand them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pocketvlm.errors import UnsupportedError

__all__ = [
    "Codes",
    "Constexpr",
    "FloatArray",
    "exact_floats",
    "fill_table",
    "narrow_float",
    "offset_of",
    "shifted_codes",
    "steps_of",
]

FloatArray = npt.NDArray[np.float16] | npt.NDArray[np.float32]

_BYTE = 8
_NIBBLE = 4
_FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """Integers of a few bits.

    Attributes:
        values: uint8 or int8, one code per element.
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
        source: A sparse operator, whose two results, a mask and the values it keeps, are operands
            of this one.
    """

    operator: str
    operands: Mapping[str, Codes | FloatArray | npt.NDArray[np.uint32] | int | Constexpr]
    shape: tuple[int, int]
    source: Constexpr | None = None


def shifted_codes(codes: npt.NDArray[np.uint8], bits: int, *, symmetric: bool) -> Codes:
    """Codes of 4 or 8 bits as a shift-scale reads them: signed where the zero point is implied."""
    if not symmetric:
        return Codes(values=codes, bits=bits)
    middle = 1 << (bits - 1)
    return Codes(values=(codes.astype(np.int16) - middle).astype(np.int8), bits=bits)


def steps_of(bits: int, *, symmetric: bool) -> Codes:
    """The table 0, 1, 2, ... that codes of 2 or 3 bits look up, less the implied zero point."""
    table = np.arange(1 << bits, dtype=np.uint8)
    steps = (table.astype(np.int8) - np.int8(1 << (bits - 1))) if symmetric else table
    return Codes(values=steps.reshape(1, 1, -1, 1), bits=_BYTE)


def offset_of(zeros: Tensor, bits: int, float_type: type[np.floating]) -> Codes | FloatArray:
    """Zero points of codes of `bits` bits, as float, or in the type of what they are taken off."""
    if zeros.is_floating_point():
        return exact_floats(zeros, float_type)
    # That is the type of the table where codes are looked up.
    return Codes(values=zeros.numpy(), bits=_NIBBLE if bits == _NIBBLE else _BYTE)


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


def fill_table(codebooks: Tensor, bits: int) -> Tensor:
    """Codebooks with as many entries as an index can name; what is added is never named."""
    groups, columns, entries, length = codebooks.shape
    missing = (1 << bits) - entries
    if not missing:
        return codebooks
    filler = torch.zeros(groups, columns, missing, length, dtype=codebooks.dtype)
    return torch.cat([codebooks, filler], dim=2)


def exact_floats(values: Tensor, float_type: type[np.floating]) -> FloatArray:
    """Values that float16 holds exactly, in either type."""
    wide = values.to(torch.float16 if float_type is np.float16 else torch.float32)
    return wide.contiguous().numpy()
