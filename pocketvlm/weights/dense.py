"""DenseWeight: a weight as its checkpoint stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pocketvlm.weights.form import WeightForm

__all__ = ["DenseWeight"]

_ALIGNMENT = 64  # bytes: where torch's own memory begins


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseWeight(WeightForm):
    """A weight as its checkpoint stores it.

    Attributes:
        values: [out_features, in_features], of any float type.
    """

    kind: ClassVar[str] = "dense"

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.values.shape[1])

    @property
    def layout(self) -> None:
        return None

    def dequantize(self) -> Tensor:
        wide = self.values.to(torch.float32)
        # A file may hold them anywhere, and kernels may sum in another order there.
        return wide if wide.data_ptr() % _ALIGNMENT == 0 else wide.clone()

    def take_rows(self, rows: Tensor) -> Tensor:
        return self.values[rows].to(torch.float32)

    def to_tensors(self) -> dict[str, Tensor]:
        return {"weight": self.values}

    def to_metadata(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> DenseWeight:
        return cls(values=tensors["weight"])
