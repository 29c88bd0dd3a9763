"""WeightForm: what every stored form of a weight matrix can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from pocketvlm.weights.layout import WeightLayout

__all__ = ["WeightForm", "total_stored_bytes"]


class WeightForm(ABC):
    """One weight matrix [out_features, in_features] in some stored form."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the dense matrix."""

    @property
    @abstractmethod
    def layout(self) -> WeightLayout | None:
        """How the matrix is stored, without its numbers; `None` for a dense one."""

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

    def without_mask(self) -> WeightForm:
        """The same matrix for runtimes that know no masks; itself where it has none."""
        return self

    @property
    def stored_bytes(self) -> int:
        """Bytes of everything that is stored."""
        return sum(t.numel() * t.element_size() for t in self.to_tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and zero points included."""
        rows, columns = self.shape
        return self.stored_bytes * 8 / (rows * columns)


def total_stored_bytes(forms: Iterable[WeightForm]) -> int:
    """Bytes of several forms together; a tensor that they share counts once."""
    tensors = (tensor for form in forms for tensor in form.to_tensors().values())
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
