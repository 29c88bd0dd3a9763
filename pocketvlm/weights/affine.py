"""AffineWeight: group-wise affine integers, what every runtime has a kernel for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pocketvlm.weights.bitpack import pack_codes, unpack_codes
from pocketvlm.weights.form import WeightForm

__all__ = ["AffineWeight"]


@dataclass(frozen=True, kw_only=True, eq=False)
class AffineWeight(WeightForm):
    """Group-wise affine integers: w = scale * (code - zero), one scale a row and group.

    Groups run along the input. Where `group_size` does not divide `in_features`, the last group is
    padded with codes that mean zero; the padding is stored and never seen outside.

    Attributes:
        packed: `pack_codes` of the codes [out_features, groups * group_size].
        scales: float16, [out_features, groups].
        zeros: Zero points [out_features, groups]: uint8, or float16 where they need not be codes
            (then no weight may be exactly zero); `None` for the symmetric grid, whose zero point
            is 2**(bits - 1) everywhere.
        bits: 2, 3, 4 or 8.
        group_size: Columns that share a scale.
        in_features: Columns of the dense matrix.
    """

    kind: ClassVar[str] = "affine"

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    in_features: int

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits must be 2, 3, 4 or 8, not {self.bits}")
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
        if self.scales.dtype != torch.float16:
            raise ValueError(f"scales are {self.scales.dtype}, not torch.float16")
        if self.zeros is not None and (
            self.zeros.shape != self.scales.shape
            or self.zeros.dtype not in (torch.uint8, torch.float16)
        ):
            raise ValueError(
                "zero points need the shape of the scales and type torch.uint8 or torch.float16"
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

    @property
    def has_float_zeros(self) -> bool:
        """Whether zero points lie between codes."""
        return self.zeros is not None and self.zeros.dtype == torch.float16

    @property
    def groups(self) -> int:
        """Groups a row."""
        return self.scales.shape[1]

    def codes(self) -> Tensor:
        """The codes, uint8 [out_features, groups * group_size], padding included."""
        count = self.groups * self.group_size
        return torch.from_numpy(unpack_codes(self.packed.numpy(), self.bits, count))

    def zero_points(self) -> Tensor:
        """Zero points of any grid, uint8 or float16 [out_features, groups]."""
        if self.zeros is not None:
            return self.zeros
        return torch.full(self.scales.shape, 1 << (self.bits - 1), dtype=torch.uint8)

    def dequantize(self) -> Tensor:
        return _dequantize(self.codes(), self.scales, self.zero_points())[..., : self.in_features]

    def take_rows(self, rows: Tensor) -> Tensor:
        flat = rows.reshape(-1)
        count = self.groups * self.group_size
        codes = torch.from_numpy(unpack_codes(self.packed[flat].numpy(), self.bits, count))
        dense = _dequantize(codes, self.scales[flat], self.zero_points()[flat])
        return dense[..., : self.in_features].reshape(*rows.shape, self.in_features)

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {"codes": self.packed, "scales": self.scales}
        if self.zeros is not None:
            tensors["zeros"] = self.zeros
        return tensors

    def to_metadata(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "bits": self.bits,
            "group_size": self.group_size,
            "in_features": self.in_features,
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> AffineWeight:
        return cls(
            packed=tensors["codes"],
            scales=tensors["scales"],
            zeros=tensors.get("zeros"),
            bits=metadata["bits"],
            group_size=metadata["group_size"],
            in_features=metadata["in_features"],
        )


def _dequantize(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    # In place: for a large table every temporary is as large as the float32 result.
    dense = codes.view(*scales.shape, -1).to(torch.float32)
    dense -= zeros.to(torch.float32)[..., None]
    dense *= scales.to(torch.float32)[..., None]
    return dense.view(scales.shape[0], -1)
