"""SparseWeight: a mask of bits, and values for the elements that it keeps alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pocketvlm.errors import UnsupportedError
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.bitpack import pack_codes, unpack_codes
from pocketvlm.weights.codebook import CodebookWeight
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.layout import SparseLayout
from pocketvlm.weights.nonzeros import (
    AffineNonzeros,
    CodebookNonzeros,
    FloatNonzeros,
    Nonzeros,
    pack_kept,
)

__all__ = ["SparseWeight"]

_KINDS: tuple[type[Nonzeros], ...] = (FloatNonzeros, AffineNonzeros, CodebookNonzeros)
_FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseWeight(WeightForm):
    """A matrix of which a mask keeps some elements, one at least; all others are exactly 0.

    Attributes:
        mask: uint8 [out_features, ceil(in_features / 8)]: `pack_codes` of one bit per element, 1
            where it is kept; bits after the row are 0.
        values: The kept elements, row by row.
        in_features: Columns of the dense matrix.
    """

    kind: ClassVar[str] = "sparse"

    mask: Tensor
    values: Nonzeros
    in_features: int

    def __post_init__(self) -> None:
        width = -(-self.in_features // 8)
        if self.mask.ndim != 2 or self.mask.shape[1] != width or self.mask.dtype != torch.uint8:  # noqa: PLR2004  (rank)
            raise ValueError(
                f"the mask is {tuple(self.mask.shape)} {self.mask.dtype}, not [rows, {width}] "
                "torch.uint8"
            )
        unused = 8 * width - self.in_features
        if unused and bool((self.mask[:, -1] >> (8 - unused)).any()):
            raise ValueError(f"the mask keeps elements beyond column {self.in_features}")
        if not self.kept:
            raise ValueError("the mask keeps no element; no runtime stores an empty weight")
        self.values.check(*self.shape, self.kept)

    @classmethod
    def from_form(cls, form: WeightForm, mask: Tensor) -> SparseWeight:
        """Keeps some elements of a weight, as they are; floats are rounded to float16.

        Args:
            form: A dense weight, integers, or a look-up of single values without extras.
            mask: bool [out_features, in_features], true where an element is kept.

        Raises:
            ValueError: The mask is of another shape or type, or keeps nothing.
            UnsupportedError: Elements of the form cannot be stored one by one.
        """
        if tuple(mask.shape) != form.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"the mask is {tuple(mask.shape)} {mask.dtype}, not {form.shape} torch.bool"
            )
        return cls(
            mask=torch.from_numpy(pack_codes(mask.to(torch.uint8).numpy(), 1)),
            values=_keep(form, mask),
            in_features=form.shape[1],
        )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.mask.shape[0], self.in_features)

    @property
    def layout(self) -> SparseLayout:
        return SparseLayout(density=self.density, values=self.values.layout)

    @cached_property
    def kept(self) -> int:
        """Elements that are kept."""
        return int(self._row_counts.sum())

    @property
    def density(self) -> float:
        """Share of elements that are kept."""
        rows, columns = self.shape
        return self.kept / (rows * columns)

    def keeps(self, rows: Tensor | None = None) -> Tensor:
        """Which elements are kept, of all or some rows: bool [rows, in_features]."""
        packed = self.mask if rows is None else self.mask[rows]
        bits = unpack_codes(packed.numpy(), 1, self.in_features)
        return torch.from_numpy(bits.view(np.bool_))

    def stored(self) -> Tensor:
        """What is stored of each kept element, row by row: float16, or codes in uint8; [kept]."""
        return self.values.read(self.kept)

    def dequantize(self) -> Tensor:
        return self._decode(self.keeps(), self.stored(), torch.arange(self.shape[0]))

    def take_rows(self, rows: Tensor) -> Tensor:
        flat = rows.reshape(-1)
        keeps = self.keeps(flat)
        before = self._row_counts.cumsum(0) - self._row_counts
        places = (before[flat][:, None] + keeps.cumsum(1) - 1)[keeps]
        dense = self._decode(keeps, self.values.read(self.kept, places), flat)
        return dense.reshape(*rows.shape, self.in_features)

    def without_mask(self) -> WeightForm:
        """The matrix as a runtime without kernels for masks stores it (`layout.without_mask`).

        Returns:
            `AffineWeight` with the very codes of the kept elements, and the zero point elsewhere;
            or `DenseWeight` in float32 where the kept elements are floats or indices, or where no
            code of their grid means zero.
        """
        values = self.values
        if not isinstance(values, AffineNonzeros) or values.has_float_zeros:
            return DenseWeight(values=self.dequantize())
        codes = values.zero_points().repeat_interleave(values.group_size, dim=1)
        codes[:, : self.in_features][self.keeps()] = self.stored()
        return AffineWeight.from_codes(
            codes,
            values.scales,
            values.zeros,
            bits=values.bits,
            group_size=values.group_size,
            in_features=self.in_features,
        )

    def to_tensors(self) -> dict[str, Tensor]:
        return {"mask": self.mask, **self.values.to_tensors()}

    def to_metadata(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "values": self.values.to_metadata(),
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> SparseWeight:
        own = metadata["values"]
        values = next(kind for kind in _KINDS if kind.kind == own["kind"])
        return cls(
            mask=tensors["mask"],
            values=values.from_tensors(tensors, own),
            in_features=metadata["in_features"],
        )

    @cached_property
    def _row_counts(self) -> Tensor:
        return torch.from_numpy(np.bitwise_count(self.mask.numpy()).sum(axis=1, dtype=np.int64))

    def _decode(self, keeps: Tensor, stored: Tensor, rows: Tensor) -> Tensor:
        spread = torch.zeros(keeps.shape, dtype=stored.dtype)
        spread[keeps] = stored
        # Where code 0 does not mean zero, what a grid makes of it is masked again.
        return self.values.expand(spread, rows, self.shape[0]).masked_fill_(~keeps, 0.0)


def _keep(form: WeightForm, mask: Tensor) -> Nonzeros:
    if isinstance(form, DenseWeight):
        wide = form.values[mask].to(torch.float32)
        largest = float(wide.abs().max()) if wide.numel() else 0.0
        if largest > _FLOAT16_MAX:
            raise UnsupportedError(
                f"a weight has a value of {largest:.4g}, and sparse floats end at "
                f"{_FLOAT16_MAX:.0f}; a dense weight would work"
            )
        return FloatNonzeros(values=wide.to(torch.float16))
    if isinstance(form, AffineWeight):
        return AffineNonzeros(
            packed=pack_kept(form.codes()[:, : form.in_features][mask], form.bits),
            scales=form.scales,
            zeros=form.zeros,
            bits=form.bits,
            group_size=form.group_size,
        )
    if isinstance(form, CodebookWeight) and form.layout.is_palette:
        return CodebookNonzeros(
            packed=pack_kept(form.main.indices()[mask], form.main.index_bits),
            codebooks=form.main.codebooks,
            index_bits=form.main.index_bits,
            row_scales=form.row_scales,
        )
    raise UnsupportedError(
        f"a weight of kind {form.kind!r} with this layout cannot be masked element by element; "
        "dense values, integers, and tables of up to 256 single values by groups of rows would work"
    )
