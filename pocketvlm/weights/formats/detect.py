"""Which layout a config.json declares, and how its layers are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from pocketvlm.errors import CheckpointError, UnsupportedError
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.formats.compressed_tensors_config import CompressedTensorsLayout
from pocketvlm.weights.formats.gptq_config import GptqLayout
from pocketvlm.weights.formats.vptq import VptqLayout

__all__ = ["StoredLayout", "read_stored_layout"]


class StoredLayout(Protocol):
    """How the quantized layers of a directory are stored."""

    def holds(self, tensors: Sequence[str]) -> bool:
        """Whether a layer with tensors of these last names is quantized."""
        ...

    def read(self, name: str, tensors: Mapping[str, Tensor]) -> WeightForm:
        """The form of a quantized layer."""
        ...


def read_stored_layout(config: Mapping[str, Any]) -> StoredLayout | None:
    """The layout that a config.json declares; `None` for plain float weights.

    Raises:
        CheckpointError: Its `quantization_config` cannot be understood.
        UnsupportedError: It is of a method that is not read here.
    """
    declared = config.get("quantization_config")
    if declared is None:
        return None
    if not isinstance(declared, Mapping):
        raise CheckpointError("config.json: quantization_config is not a JSON object")
    match declared.get("quant_method"):
        case "gptq":
            return GptqLayout.from_config(declared)
        case "vptq":
            return VptqLayout.from_config(declared)
        case "compressed-tensors":
            return CompressedTensorsLayout.from_config(declared)
        case other:
            raise UnsupportedError(
                f"config.json: quantization_config.quant_method {other!r} is not supported; "
                "supported are gptq, vptq, compressed-tensors"
            )
