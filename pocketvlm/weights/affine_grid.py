"""AffineGrid: what integers mean, by one scale and zero point per row and group of columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketvlm.weights.layout import AffineLayout

__all__ = ["AffineGrid"]


@dataclass(frozen=True, kw_only=True, eq=False)
class AffineGrid:
    """w = scale * (code - zero): the part of an integer weight that is not its codes.

    Attributes:
        scales: float16 [rows, groups].
        zeros: Zero points [rows, groups]: uint8 codes, or float16 where they need not be codes
            (then no weight may be exactly zero); `None` for the symmetric grid, whose zero point
            is 2**(bits - 1) everywhere.
        bits: 2, 3, 4 or 8.
        group_size: Columns that share a scale.
    """

    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits must be 2, 3, 4 or 8, not {self.bits}")
        if self.scales.dtype != torch.float16:
            raise ValueError(f"scales are {self.scales.dtype}, not torch.float16")
        zeros = self.zeros
        if zeros is None:
            return
        if zeros.shape != self.scales.shape or zeros.dtype not in (torch.uint8, torch.float16):
            raise ValueError(
                "zero points need the shape of the scales and type torch.uint8 or torch.float16"
            )
        highest = (1 << self.bits) - 1
        if zeros.dtype == torch.uint8 and zeros.numel() and int(zeros.max()) > highest:
            raise ValueError(
                f"a zero point of {int(zeros.max())} is not a code of {self.bits} bits; integer "
                f"zero points end at {highest}"
            )

    @property
    def layout(self) -> AffineLayout:
        """How codes on the grid are stored."""
        return AffineLayout(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.zeros is None,
            float_zeros=self.has_float_zeros,
        )

    @property
    def has_float_zeros(self) -> bool:
        """Whether zero points lie between codes."""
        return self.zeros is not None and self.zeros.dtype == torch.float16

    @property
    def groups(self) -> int:
        """Groups per row."""
        return self.scales.shape[1]

    def zero_points(self) -> Tensor:
        """Zero points of any grid, uint8 or float16 [rows, groups]."""
        if self.zeros is not None:
            return self.zeros
        return torch.full(self.scales.shape, 1 << (self.bits - 1), dtype=torch.uint8)

    def decode(self, codes: Tensor, rows: Tensor | None = None) -> Tensor:
        """What codes mean, in float32.

        Args:
            codes: [n, groups * group_size], padding of the last group included.
            rows: Which rows these are, int64 [n]; `None` for all.
        """
        scales, zeros = self.scales, self.zero_points()
        if rows is not None:
            scales, zeros = scales[rows], zeros[rows]
        # In place: for a large table every temporary is as large as the float32 result.
        dense = codes.view(*scales.shape, self.group_size).to(torch.float32)
        dense -= zeros.to(torch.float32)[..., None]
        dense *= scales.to(torch.float32)[..., None]
        return dense.view(codes.shape)

    def grid_tensors(self) -> dict[str, Tensor]:
        """Scales, and zero points where they are stored."""
        tensors = {"scales": self.scales}
        if self.zeros is not None:
            tensors["zeros"] = self.zeros
        return tensors

    def grid_metadata(self) -> dict[str, Any]:
        """The grid's numbers, as JSON values."""
        return {"bits": self.bits, "group_size": self.group_size}

    @staticmethod
    def grid_fields(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a grid out of what `grid_tensors` and `grid_metadata` gave."""
        return {
            "scales": tensors["scales"],
            "zeros": tensors.get("zeros"),
            "bits": metadata["bits"],
            "group_size": metadata["group_size"],
        }
