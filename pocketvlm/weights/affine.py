"""AffineWeight: group-wise affine integers, what every runtime has a kernel for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pocketvlm.weights.affine_grid import AffineGrid
from pocketvlm.weights.bitpack import pack_codes, unpack_codes
from pocketvlm.weights.form import WeightForm

__all__ = ["AffineWeight"]


@dataclass(frozen=True, kw_only=True, eq=False)
class AffineWeight(AffineGrid, WeightForm):
    """A code for every element, on an `AffineGrid`.

    Groups run along the input. Where `group_size` does not divide `in_features`, the last group is
    padded with codes that mean zero; the padding is stored and never seen outside.

    Attributes:
        packed: `pack_codes` of the codes [out_features, groups * group_size].
        in_features: Columns of the dense matrix.
    """

    kind: ClassVar[str] = "affine"

    packed: Tensor
    in_features: int

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, groups = self.scales.shape
        if groups != -(-self.in_features // self.group_size):
            raise ValueError(
                f"{groups} groups of {self.group_size} do not cover {self.in_features} columns"
            )
        expected = (rows, -(-groups * self.group_size * self.bits // 8))
        if tuple(self.packed.shape) != expected or self.packed.dtype != torch.uint8:
            raise ValueError(
                f"packed codes are {tuple(self.packed.shape)} {self.packed.dtype}, not {expected} "
                "torch.uint8"
            )

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        *,
        bits: int,
        group_size: int,
        in_features: int,
    ) -> AffineWeight:
        """Builds the form from plain codes.

        Args:
            codes: Integers [out_features, groups * group_size], padding included.
            scales: [out_features, groups]; must be exact in float16.
            zeros: Integers or float16 [out_features, groups], or `None` for the symmetric grid.
            bits: Width of one code.
            group_size: Columns that share a scale.
            in_features: Columns of the dense matrix, without padding.
        """
        packed = pack_codes(codes.to(torch.uint8).numpy(), bits)
        return cls(
            packed=torch.from_numpy(packed),
            scales=scales.to(torch.float16),
            zeros=zeros if zeros is None or zeros.dtype == torch.float16 else zeros.to(torch.uint8),
            bits=bits,
            group_size=group_size,
            in_features=in_features,
        )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.scales.shape[0], self.in_features)

    def codes(self, rows: Tensor | None = None) -> Tensor:
        """Codes of all or some rows, uint8 [rows, groups * group_size], padding included."""
        packed = self.packed if rows is None else self.packed[rows]
        count = self.groups * self.group_size
        return torch.from_numpy(unpack_codes(packed.numpy(), self.bits, count))

    def dequantize(self) -> Tensor:
        return self.decode(self.codes())[..., : self.in_features]

    def take_rows(self, rows: Tensor) -> Tensor:
        flat = rows.reshape(-1)
        dense = self.decode(self.codes(flat), flat)[..., : self.in_features]
        return dense.reshape(*rows.shape, self.in_features)

    def to_tensors(self) -> dict[str, Tensor]:
        return {"codes": self.packed, **self.grid_tensors()}

    def to_metadata(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.grid_metadata(), "in_features": self.in_features}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> AffineWeight:
        return cls(
            packed=tensors["codes"],
            in_features=metadata["in_features"],
            **cls.grid_fields(tensors, metadata),
        )
