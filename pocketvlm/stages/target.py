"""Target: one export format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pocketvlm.bundle import Component
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.models.spec import LinearSpec, ModelSpec
from pocketvlm.stages.plan_state import FLOAT_CACHE_BITS, PlanState
from pocketvlm.weights.layout import WeightLayout

__all__ = ["Prediction", "Target"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a target would make of a model.

    Attributes:
        part_bytes: Bytes by part of the model, and `other` for what is not a weight matrix.
        refused: What it cannot run, each with what would work.
        warnings: What it can run at a price.
        unpacked_bytes: What weights grow by when they are loaded, where the file holds them packed.
    """

    part_bytes: Mapping[str, int]
    refused: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    unpacked_bytes: int = 0


class Target(ABC):
    """One export format; a subclass is a frozen dataclass that is its own configuration.

    Attributes:
        cache_bits: Widths of quantized KV caches that it keeps; float32 ones are kept by all.
        supports_visual_cutoff: Whether visual rows may end before the decoder's last layer.
    """

    cache_bits: ClassVar[frozenset[int]] = frozenset()
    supports_visual_cutoff: ClassVar[bool] = False

    @property
    @abstractmethod
    def method(self) -> str:
        """The tag that names the target in a recipe."""

    @abstractmethod
    def predict(
        self, spec: ModelSpec, layouts: Mapping[LinearSpec, WeightLayout | None], /
    ) -> Prediction:
        """What the export would weigh, and what the target cannot run, before any compute."""

    @abstractmethod
    def layer_bytes(self, layout: WeightLayout | None, shape: tuple[int, int], /) -> int:
        """Bytes of one matrix [rows, columns] in the files, without the graph around it.

        Raises:
            UnsupportedError: The target's files cannot hold such a matrix.
        """

    @abstractmethod
    def capacity(self, spec: ModelSpec) -> int:
        """Rows of KV cache that a conversation with the exported model may take."""

    @abstractmethod
    def export(
        self, checkpoint: Checkpoint, folder: Path, ctx: RunContext
    ) -> tuple[Component, ...]:
        """Writes the target's graphs below `folder` and describes them.

        Raises:
            MissingExtraError: The target's toolkit is not installed.
            UnsupportedError: The checkpoint holds what the target cannot run.
            ExportError: The toolkit refuses the model.
        """

    def refuse(self, state: PlanState) -> tuple[str, ...]:
        """What beside its layers the target cannot run of a planned model, with what would work."""
        refused = []
        if state.cache_bits != FLOAT_CACHE_BITS and state.cache_bits not in self.cache_bits:
            refused.append(
                f"{self.method}: keeps no KV cache of {state.cache_bits} bits; leave "
                "quantize_cache out of the stages for this target"
            )
        if state.visual_layers is not None and not self.supports_visual_cutoff:
            refused.append(
                f"{self.method}: runs every row through every decoder layer; leave skip_visual out "
                "of the stages for this target (reduce_tokens runs everywhere), or export to ONNX "
                "alone"
            )
        return tuple(refused)
