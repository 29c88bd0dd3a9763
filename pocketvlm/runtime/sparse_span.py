"""A matrix of which a packed file holds the kept elements alone, and how it becomes whole again.

Behind one another lie the mask, the fills, the values. Numbers of a few bits are packed as by
`pack_codes`, lowest bits first; wider ones are little-endian.

- The mask has a bit a block, row by row, rows to whole bytes; or, where every `of` neighbouring
  columns keep `keep`, the number of each choice among all in lexicographic order. It may also be
  that of an earlier matrix, and then takes no bytes.
- Fills are what elements outside of the mask are: one number for all, or one a row and group.
- Values are elements, row by row; or float16 that is widened to float32; or indices into one table
  for each of several equal groups of rows, which elements of 32 bits may scale by row.

Bytes that come out are the bytes of the file that was packed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pocketvlm.weights.bitpack import pack_codes, unpack_codes

__all__ = ["Bytes", "MaskedSpan"]

Bytes = npt.NDArray[np.uint8]

_BYTE = 8
_HALF, _WORD = 16, 32
_WIDTHS = (2, 4, _BYTE, _HALF, _WORD)
_WIDE: Mapping[int, np.dtype[Any]] = {_HALF: np.dtype("<u2"), _WORD: np.dtype("<u4")}


@dataclass(frozen=True, kw_only=True)
class MaskedSpan:
    """One matrix of a packed file; its bytes are told by `sections`.

    Attributes:
        rows: Rows.
        columns: Columns that the mask is about.
        width: Elements a row in the file; those behind `columns` are fills.
        bits: Bits of an element: 2, 4, 8, 16 or 32.
        kept: Elements that the mask keeps.
        fill: What elements outside of the mask are, where `group` is 0.
        group: Elements of a row that share a fill; 0 for one fill for all.
        block: Rows and columns that a bit of the mask stands for.
        choice: `(keep, of)` where every `of` columns keep `keep`, which is how the mask is stored.
        like: Number of the earlier span that has the mask; `None` where it is stored here.
        is_half: Whether values are float16 and elements float32.
        tables: `(index_bits, tables, entries)` where values are indices; elements of 32 bits have
            tables of float16, those of 16 bits tables of elements.
        row_scales: Whether what is looked up is multiplied by a float16 of its row.
    """

    rows: int
    columns: int
    width: int
    bits: int
    kept: int
    fill: int = 0
    group: int = 0
    block: tuple[int, int] = (1, 1)
    choice: tuple[int, int] | None = None
    like: int | None = None
    is_half: bool = False
    tables: tuple[int, int, int] | None = None
    row_scales: bool = False

    def __post_init__(self) -> None:
        if self.bits not in _WIDTHS or not 0 < self.columns <= self.width or self.rows < 1:
            raise ValueError(f"{self.rows} x {self.columns} of {self.width} elements, {self.bits}")
        if self.width * self.bits % _BYTE:
            raise ValueError(f"{self.width} elements of {self.bits} bits are no whole bytes")
        if not 0 <= self.kept <= self.rows * self.columns:
            raise ValueError(f"{self.kept} of {self.rows} x {self.columns} elements are kept")
        if self.rows % self.block[0] or self.columns % self.block[1]:
            raise ValueError(f"blocks of {self.block} do not divide the matrix")
        if self.choice is not None and (
            self.columns % self.choice[1] or not 0 < self.choice[0] < self.choice[1] <= _BYTE
        ):
            raise ValueError(f"a choice of {self.choice} does not suit {self.columns} columns")
        if self.group < 0 or (self.group and self.bits > _BYTE) or not 0 <= self.fill < 1 << _BYTE:
            raise ValueError(f"fills of {self.group} elements and {self.bits} bits")
        if (self.is_half or self.row_scales) and self.bits != _WORD:
            raise ValueError(f"elements of {self.bits} bits are no float32")
        if self.tables is not None and (
            self.is_half
            or self.bits < _HALF
            or self.rows % self.tables[1]
            or not 1 <= self.tables[0] <= _BYTE
            or not 1 <= self.tables[2] <= 1 << self.tables[0]
        ):
            raise ValueError(f"tables {self.tables} of {self.rows} rows and {self.bits} bits")

    @property
    def whole_bytes(self) -> int:
        """Bytes of the whole matrix."""
        return self.rows * self.width * self.bits // _BYTE

    @property
    def sections(self) -> tuple[int, ...]:
        """Bytes of mask, fills, values, tables and scales of rows in the packed file."""
        groups = -(-self.width // self.group) if self.group else 0
        fills = self.rows * -(-groups * self.bits // _BYTE)
        tables = scales = 0
        value_bits = _HALF if self.is_half else self.bits
        if self.tables is not None:
            value_bits, count, entries = self.tables
            tables = count * entries * _HALF // _BYTE
            scales = self.rows * _HALF // _BYTE if self.row_scales else 0
        return (self.mask_bytes, fills, -(-self.kept * value_bits // _BYTE), tables, scales)

    @property
    def mask_bytes(self) -> int:
        """Bytes of the mask in the packed file."""
        if self.like is not None:
            return 0
        if self.choice is not None:
            places = self.columns // self.choice[1]
            return self.rows * -(-places * _choice_bits(*self.choice) // _BYTE)
        high, wide = self.block
        return self.rows // high * -(-self.columns // wide // _BYTE)

    def to_json(self) -> dict[str, Any]:
        """What is not as usual, as JSON values."""
        usual = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != usual[name]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Undoes `to_json`.

        Raises:
            ValueError, TypeError: It is not what `to_json` wrote.
        """
        plain: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in document.items()
        }
        flat = [x for v in plain.values() for x in (v if isinstance(v, tuple) else (v,))]
        if not all(isinstance(value, int) for value in flat):
            raise TypeError("a masked matrix is described by whole numbers")
        return cls(**plain)

    def read_mask(self, packed: Bytes) -> npt.NDArray[np.bool_]:
        """The mask [rows, columns] out of its bytes.

        Raises:
            ValueError: It does not keep `kept` elements.
        """
        if self.choice is not None:
            table = choice_table(*self.choice)
            bits, of = _choice_bits(*self.choice), self.choice[1]
            numbers = unpack_codes(packed.reshape(self.rows, -1), bits, self.columns // of)
            if int(numbers.max()) >= len(table):
                raise ValueError(f"choice {int(numbers.max())} of {len(table)}")
            keeps = table[numbers].reshape(self.rows, self.columns)
        else:
            high, wide = self.block
            cells = unpack_codes(packed.reshape(self.rows // high, -1), 1, self.columns // wide)
            keeps = cells.view(np.bool_).repeat(high, axis=0).repeat(wide, axis=1)
        self.require_kept(keeps)
        return keeps

    def write_mask(self, keeps: npt.NDArray[np.bool_]) -> Bytes:
        """Undoes `read_mask`."""
        if self.choice is not None:
            places = keeps.reshape(self.rows, -1, self.choice[1])
            # A choice as a binary number finds its place in the table.
            weights = 1 << np.arange(self.choice[1])
            numbers = np.zeros(1 << self.choice[1], np.uint8)
            for number, row in enumerate(choice_table(*self.choice)):
                numbers[int(row @ weights)] = number
            packed = pack_codes(numbers[places @ weights], _choice_bits(*self.choice))
        else:
            high, wide = self.block
            packed = pack_codes(keeps[::high, ::wide].view(np.uint8), 1)
        return packed.reshape(-1)

    def require_kept(self, keeps: npt.NDArray[np.bool_]) -> None:
        """Refuses a mask that is not this matrix'.

        Raises:
            ValueError: Its shape or its number of kept elements is another.
        """
        count = int(np.count_nonzero(keeps))
        if keeps.shape != (self.rows, self.columns) or count != self.kept:
            raise ValueError(f"a mask of {keeps.shape} keeps {count} elements, not {self.kept}")

    def expand(
        self,
        keeps: npt.NDArray[np.bool_],
        fills: Bytes,
        values: Bytes,
        tables: Bytes,
        row_scales: Bytes,
    ) -> Bytes:
        """The bytes of the whole matrix.

        Args:
            keeps: Its mask.
            fills: As the packed file holds them, like all below.
            values: Elements, halves or indices.
            tables: Of indices.
            row_scales: Of what is looked up.

        Raises:
            IndexError: An index is not in its table.
        """
        dense = self._filled(fills)
        dense[:, : self.columns][keeps] = self._elements(keeps, values, tables, row_scales)
        if self.bits < _BYTE:
            return pack_codes(dense, self.bits).reshape(-1)
        return dense.reshape(-1).view(np.uint8)

    def elements(self, whole: Bytes) -> npt.NDArray[Any]:
        """The elements of the whole matrix out of its bytes, [rows, width]."""
        if self.bits > _BYTE:
            return whole.view(_WIDE[self.bits]).reshape(self.rows, self.width)
        return unpack_codes(whole.reshape(self.rows, -1), self.bits, self.width)

    def _filled(self, fills: Bytes) -> npt.NDArray[Any]:
        shape = (self.rows, self.width)
        if not self.group:
            return np.full(shape, self.fill, _WIDE.get(self.bits, np.dtype(np.uint8)))
        groups = -(-self.width // self.group)
        codes = unpack_codes(fills.reshape(self.rows, -1), self.bits, groups)
        return np.ascontiguousarray(codes.repeat(self.group, axis=1)[:, : self.width])

    def _elements(
        self, keeps: npt.NDArray[np.bool_], values: Bytes, tables: Bytes, row_scales: Bytes
    ) -> npt.NDArray[Any]:
        if self.is_half:
            return values.view("<f2").astype("<f4").view("<u4")
        if self.tables is None:
            if self.bits > _BYTE:
                return values.view(_WIDE[self.bits])
            return unpack_codes(values, self.bits, self.kept)
        index_bits, count, entries = self.tables
        indices = unpack_codes(values, index_bits, self.kept).astype(np.intp)
        if self.kept and int(indices.max()) >= entries:
            raise IndexError(f"index {int(indices.max())} of {entries}")
        rows = np.repeat(np.arange(self.rows), np.count_nonzero(keeps, axis=1))
        indices += rows * count // self.rows * entries
        if self.bits == _HALF:
            return tables.view(_WIDE[_HALF])[indices]
        found = tables.view("<f2").astype("<f4")[indices]
        if self.row_scales:
            found *= row_scales.view("<f2").astype("<f4")[rows]
        return found.view("<u4")


def choice_table(keep: int, of: int) -> npt.NDArray[np.bool_]:
    """Every choice of `keep` among `of` columns, in lexicographic order of the chosen ones."""
    chosen = list(combinations(range(of), keep))
    table = np.zeros((len(chosen), of), np.bool_)
    for row, columns in zip(table, chosen, strict=True):
        row[list(columns)] = True
    return table


def _choice_bits(keep: int, of: int) -> int:
    return max(1, (math.comb(of, keep) - 1).bit_length())
