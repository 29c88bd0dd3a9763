"""What a sparse weight stores of the elements that it keeps: floats, integers or table indices.

Every kind is told a matrix in which kept elements have their stored value and all others anything,
so that scales and tables are applied as a dense form applies them, to the last bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from pocketvlm.weights.affine_grid import AffineGrid
from pocketvlm.weights.bitpack import pack_codes, unpack_codes
from pocketvlm.weights.layout import AffineLayout, CodebookLayout

__all__ = ["AffineNonzeros", "CodebookNonzeros", "FloatNonzeros", "Nonzeros", "pack_kept"]

_BYTE = 8


class Nonzeros(ABC):
    """Values of the kept elements of a matrix [rows, columns], row by row."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def layout(self) -> AffineLayout | CodebookLayout | None:
        """How values are stored; `None` for floats."""

    @abstractmethod
    def check(self, rows: int, columns: int, kept: int) -> None:
        """Refuses a matrix that these are not the values of.

        Raises:
            ValueError: A count or shape does not fit.
        """

    @abstractmethod
    def read(self, kept: int, places: Tensor | None = None) -> Tensor:
        """What is stored, [kept], or of some elements by their number among the kept ones."""

    @abstractmethod
    def expand(self, stored: Tensor, rows: Tensor, of: int) -> Tensor:
        """Float32 values of rows [n, columns] from what is stored of each element.

        Args:
            stored: [n, columns]; 0 where no element is kept.
            rows: Which rows these are, int64 [n].
            of: Rows of the whole matrix.
        """

    @abstractmethod
    def to_tensors(self) -> dict[str, Tensor]:
        """What is stored, by the name of the field."""

    @abstractmethod
    def to_metadata(self) -> dict[str, Any]:
        """What `from_tensors` needs beside the tensors, as JSON values."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Nonzeros:
        """Undoes `to_tensors` and `to_metadata`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FloatNonzeros(Nonzeros):
    """Float values.

    Attributes:
        values: float16 [kept].
    """

    kind: ClassVar[str] = "float"

    values: Tensor

    def __post_init__(self) -> None:
        if self.values.dtype != torch.float16:
            raise ValueError(f"kept values are {self.values.dtype}, not torch.float16")

    @property
    def layout(self) -> None:
        return None

    def check(self, rows: int, columns: int, kept: int) -> None:
        if tuple(self.values.shape) != (kept,):
            raise ValueError(f"{tuple(self.values.shape)} values are not one each of {kept}")

    def read(self, kept: int, places: Tensor | None = None) -> Tensor:
        return self.values if places is None else self.values[places]

    def expand(self, stored: Tensor, rows: Tensor, of: int) -> Tensor:
        return stored.to(torch.float32)

    def to_tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def to_metadata(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> FloatNonzeros:
        return cls(values=tensors["values"])


@dataclass(frozen=True, kw_only=True, eq=False)
class AffineNonzeros(AffineGrid, Nonzeros):
    """A code for each kept element, on the grid of the dense matrix, whose padding is not stored.

    Attributes:
        packed: uint8 [ceil(kept * bits / 8)]: `pack_codes` of all codes, one after another.
    """

    kind: ClassVar[str] = "affine"

    packed: Tensor

    def check(self, rows: int, columns: int, kept: int) -> None:
        groups = -(-columns // self.group_size)
        if tuple(self.scales.shape) != (rows, groups):
            raise ValueError(
                f"scales are {tuple(self.scales.shape)}, not {(rows, groups)}: groups of "
                f"{self.group_size} of {columns} columns"
            )
        _check_packed(self.packed, self.bits, kept)

    def read(self, kept: int, places: Tensor | None = None) -> Tensor:
        return _read_packed(self.packed, self.bits, kept, places)

    def expand(self, stored: Tensor, rows: Tensor, of: int) -> Tensor:
        columns = stored.shape[1]
        padded = functional.pad(stored, (0, self.groups * self.group_size - columns))
        return self.decode(padded, rows)[:, :columns]

    def to_tensors(self) -> dict[str, Tensor]:
        return {"codes": self.packed, **self.grid_tensors()}

    def to_metadata(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.grid_metadata()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> AffineNonzeros:
        return cls(packed=tensors["codes"], **cls.grid_fields(tensors, metadata))


@dataclass(frozen=True, kw_only=True, eq=False)
class CodebookNonzeros(Nonzeros):
    """Indices into tables of single values, one table for each of several equal groups of rows.

    Attributes:
        packed: uint8 [ceil(kept * index_bits / 8)]: `pack_codes` of all indices.
        codebooks: float16 [row_groups, 1, k, 1], the layout of `Lookup`; layers may share it.
        index_bits: 1 to 8; k is at most 2**index_bits.
        row_scales: float16 [rows], or `None`.
    """

    kind: ClassVar[str] = "codebook"

    packed: Tensor
    codebooks: Tensor
    index_bits: int
    row_scales: Tensor | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.index_bits <= _BYTE:
            raise ValueError(f"index_bits must be 1 to 8, not {self.index_bits}")
        shape = tuple(self.codebooks.shape)
        if self.codebooks.dtype != torch.float16 or shape[1::2] != (1, 1):
            raise ValueError(
                f"codebooks are {self.codebooks.dtype} {shape}, not torch.float16 "
                "[row_groups, 1, k, 1]"
            )
        if shape[2] > 1 << self.index_bits:
            raise ValueError(f"{shape[2]} values do not fit into {self.index_bits} bits")

    @property
    def layout(self) -> CodebookLayout:
        return CodebookLayout(
            index_bits=self.index_bits,
            vector_length=1,
            row_groups=self.codebooks.shape[0],
            row_scales=self.row_scales is not None,
        )

    def check(self, rows: int, columns: int, kept: int) -> None:
        if rows % self.codebooks.shape[0]:
            raise ValueError(f"{self.codebooks.shape[0]} row groups do not divide {rows} rows")
        scales = self.row_scales
        if scales is not None and (tuple(scales.shape) != (rows,) or scales.dtype != torch.float16):
            raise ValueError(f"row_scales must be float16 [{rows}]")
        _check_packed(self.packed, self.index_bits, kept)

    def read(self, kept: int, places: Tensor | None = None) -> Tensor:
        return _read_packed(self.packed, self.index_bits, kept, places)

    def expand(self, stored: Tensor, rows: Tensor, of: int) -> Tensor:
        groups, _, entries, _ = self.codebooks.shape
        # Every table has an entry 0, which is what a masked element looks up.
        numbers = (rows * groups // of * entries)[:, None] + stored.to(torch.int64)
        dense = self.codebooks.to(torch.float32).reshape(-1)[numbers]
        if self.row_scales is not None:
            dense *= self.row_scales[rows].to(torch.float32)[:, None]
        return dense

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {"indices": self.packed, "codebooks": self.codebooks}
        if self.row_scales is not None:
            tensors["row_scales"] = self.row_scales
        return tensors

    def to_metadata(self) -> dict[str, Any]:
        return {"kind": self.kind, "index_bits": self.index_bits}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> CodebookNonzeros:
        return cls(
            packed=tensors["indices"],
            codebooks=tensors["codebooks"],
            index_bits=metadata["index_bits"],
            row_scales=tensors.get("row_scales"),
        )


def pack_kept(codes: Tensor, bits: int) -> Tensor:
    """Codes [kept] of at most 8 bits, one after another, uint8 [ceil(kept * bits / 8)]."""
    return torch.from_numpy(pack_codes(codes.to(torch.uint8).numpy(), bits))


def _check_packed(packed: Tensor, bits: int, kept: int) -> None:
    expected = (-(-kept * bits // _BYTE),)
    if tuple(packed.shape) != expected or packed.dtype != torch.uint8:
        raise ValueError(
            f"packed codes are {tuple(packed.shape)} {packed.dtype}, not {expected} torch.uint8"
        )


def _read_packed(packed: Tensor, bits: int, kept: int, places: Tensor | None) -> Tensor:
    if places is None:
        return torch.from_numpy(unpack_codes(packed.numpy(), bits, kept))
    # A code of at most 8 bits straddles two bytes at most; the last one may have no second.
    first = places * bits // _BYTE
    pair = packed[first].to(torch.int32)
    pair |= packed[(first + 1).clamp_max(packed.shape[0] - 1)].to(torch.int32) << _BYTE
    pair >>= (places * bits % _BYTE).to(torch.int32)
    return (pair & ((1 << bits) - 1)).to(torch.uint8)
