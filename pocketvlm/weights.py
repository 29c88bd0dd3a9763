"""Compressed weights: the integers that a method chose, in a form that every exporter can carry.

A form is immutable, knows its exact bytes, and `dequantize()` in float32 is the definition of
truth: torch evaluates it, each exporter packs the same codes into its runtime's own layout, and a
test unpacks them again. Scales are rounded to float16 where the grid is made, so that a runtime
which stores float16 scales loses nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "FORMS",
    "AffineWeight",
    "DenseWeight",
    "FormEmbedding",
    "FormLinear",
    "WeightForm",
    "cache_dense_weights",
    "pack_codes",
    "unpack_codes",
]


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs integers of `bits` bits along the last axis, lowest bits first, rows to whole bytes.

    Args:
        codes: Unsigned integers below 2**bits, [..., n].
        bits: Width of one code, 1 to 8.

    Returns:
        uint8, [..., ceil(n * bits / 8)].
    """
    if codes.size and int(codes.max()) >= 1 << bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit into {bits} bits")
    if 8 % bits == 0:
        return _pack_whole(codes.astype(np.uint8, copy=False), bits)
    planes = (codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    flat = planes.reshape(*codes.shape[:-1], codes.shape[-1] * bits)
    return np.packbits(flat, axis=-1, bitorder="little")


def unpack_codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Undoes `pack_codes`; `count` is the length of the last axis before packing."""
    if 8 % bits == 0:
        return _unpack_whole(packed, bits, count)
    planes = np.unpackbits(packed, axis=-1, count=count * bits, bitorder="little")
    planes = planes.reshape(*packed.shape[:-1], count, bits)
    return (planes << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)


# Codes whose width divides a byte never straddle two: no bit planes, an eighth of the memory.
def _pack_whole(codes: np.ndarray, bits: int) -> np.ndarray:
    per_byte = 8 // bits
    width = -(-codes.shape[-1] // per_byte)
    packed = np.zeros((*codes.shape[:-1], width), dtype=np.uint8)
    for place in range(per_byte):
        part = codes[..., place::per_byte]
        packed[..., : part.shape[-1]] |= part << (place * bits)
    return packed


def _unpack_whole(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    per_byte = 8 // bits
    codes = np.empty((*packed.shape[:-1], count), dtype=np.uint8)
    for place in range(per_byte):
        part = codes[..., place::per_byte]
        part[...] = (packed[..., : part.shape[-1]] >> (place * bits)) & ((1 << bits) - 1)
    return codes


class WeightForm(ABC):
    """One weight matrix [out_features, in_features] in some stored form."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the dense matrix."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The dense matrix in float32, [out_features, in_features]: the definition of truth."""

    @abstractmethod
    def take_rows(self, rows: Tensor) -> Tensor:
        """Rows of the dense matrix in float32, [*rows.shape, in_features]; for embeddings."""

    @abstractmethod
    def to_tensors(self) -> dict[str, Tensor]:
        """What is stored, by the name of the field."""

    @abstractmethod
    def to_metadata(self) -> dict[str, Any]:
        """What `from_tensors` needs beside the tensors, as JSON values."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> WeightForm:
        """Undoes `to_tensors` and `to_metadata`."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of everything that is stored."""
        return sum(t.numel() * t.element_size() for t in self.to_tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, scales and zero points included."""
        rows, columns = self.shape
        return self.stored_bytes * 8 / (rows * columns)


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

    def dequantize(self) -> Tensor:
        return self.values.to(torch.float32)

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


@dataclass(frozen=True, kw_only=True, eq=False)
class AffineWeight(WeightForm):
    """Group-wise affine integers: w = scale * (code - zero), one scale a row and group.

    Groups run along the input. Where `group_size` does not divide `in_features`, the last group is
    padded with codes that mean zero; the padding is stored and never seen outside.

    Attributes:
        packed: `pack_codes` of the codes [out_features, groups * group_size].
        scales: float16, [out_features, groups].
        zeros: uint8 zero points [out_features, groups], or `None` for the symmetric grid, whose
            zero point is 2**(bits - 1) everywhere.
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
            self.zeros.shape != self.scales.shape or self.zeros.dtype != torch.uint8
        ):
            raise ValueError("zero points need the shape of the scales and type torch.uint8")

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
            zeros: Integers [out_features, groups], or `None` for the symmetric grid.
            bits: Width of one code.
            group_size: Columns that share a scale.
            in_features: Columns of the dense matrix, without padding.
        """
        packed = pack_codes(codes.to(torch.uint8).numpy(), bits)
        return cls(
            packed=torch.from_numpy(packed),
            scales=scales.to(torch.float16),
            zeros=None if zeros is None else zeros.to(torch.uint8),
            bits=bits,
            group_size=group_size,
            in_features=in_features,
        )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.scales.shape[0], self.in_features)

    @property
    def groups(self) -> int:
        """Groups a row."""
        return self.scales.shape[1]

    def codes(self) -> Tensor:
        """The codes, uint8 [out_features, groups * group_size], padding included."""
        count = self.groups * self.group_size
        return torch.from_numpy(unpack_codes(self.packed.numpy(), self.bits, count))

    def zero_points(self) -> Tensor:
        """Zero points of either grid, uint8 [out_features, groups]."""
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


FORMS: tuple[type[WeightForm], ...] = (DenseWeight, AffineWeight)


class FormLinear(nn.Module):
    """A linear layer whose weight is a `WeightForm`; computes in float32.

    Attributes:
        form: The stored weight; assign a new one to compress the layer.
        bias: float32 [out_features], or `None`.
        cached: The dense weight, while `cache_dense_weights` holds it.
    """

    def __init__(self, form: WeightForm, bias: Tensor | None) -> None:
        super().__init__()
        self.form = form
        self.cached: Tensor | None = None
        self.bias: nn.Parameter | None = None
        if bias is not None:
            self.bias = nn.Parameter(bias.to(torch.float32), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The dense weight in float32; computed on each access outside of the cache."""
        return self.form.dequantize() if self.cached is None else self.cached

    def forward(self, inputs: Tensor) -> Tensor:
        """Applies the layer to [..., in_features]."""
        return functional.linear(inputs, self.weight, self.bias)


class FormEmbedding(nn.Module):
    """A token embedding whose table is a `WeightForm`; returns float32."""

    def __init__(self, form: WeightForm) -> None:
        super().__init__()
        self.form = form
        self.cached: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The dense table in float32; computed on each access outside of the cache."""
        return self.form.dequantize() if self.cached is None else self.cached

    def forward(self, token_ids: Tensor) -> Tensor:
        """Looks up [...] ids, returns [..., width]."""
        return self.form.take_rows(token_ids) if self.cached is None else self.cached[token_ids]


@contextmanager
def cache_dense_weights(model: nn.Module) -> Iterator[None]:
    """Keeps every dense weight in memory inside the block, for repeated forward passes.

    Costs four bytes a weight: right for evaluation of small models, wrong while compressing
    large ones.
    """
    modules = [m for m in model.modules() if isinstance(m, FormLinear | FormEmbedding)]
    shared: dict[int, Tensor] = {}
    for module in modules:
        module.cached = shared.setdefault(id(module.form), module.form.dequantize())
    try:
        yield
    finally:
        for module in modules:
            module.cached = None
