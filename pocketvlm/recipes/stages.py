"""The one table of everything that a recipe may name.

A new method is one module, one line here, one test file, one page in the docs and one line in the
changelog. Order is checked on capability flags, so a new stage edits nobody's list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pocketvlm.bundle import Component
from pocketvlm.calibration.data.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint, ReducerBuilder
from pocketvlm.compress.distillation.stage import Distill
from pocketvlm.compress.pruning.depth.stage import PruneDepth
from pocketvlm.compress.pruning.unstructured.gblm import Gblm
from pocketvlm.compress.pruning.unstructured.magnitude import Magnitude
from pocketvlm.compress.pruning.unstructured.sparsegpt import SparseGpt
from pocketvlm.compress.pruning.unstructured.sparsegpt_gptq import SparseGptGptq
from pocketvlm.compress.pruning.unstructured.wanda import Wanda
from pocketvlm.compress.pruning.visual_cutoff import SkipVisual
from pocketvlm.compress.pruning.width.stage import PruneWidth
from pocketvlm.compress.quantization.affine.awq import Awq
from pocketvlm.compress.quantization.affine.gptq import Gptq
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest
from pocketvlm.compress.quantization.codebook.stage import Codebook
from pocketvlm.compress.quantization.kv_cache import QuantizeCache
from pocketvlm.compress.quantization.mixed.stage import MixedPrecision
from pocketvlm.compress.quantization.transforms.rotation import Rotate
from pocketvlm.compress.tokens.stage import ReduceTokens
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.export.executorch.target import ToExecutorch
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.export.prediction import Prediction
from pocketvlm.models.spec import LinearSpec, ModelSpec
from pocketvlm.weights.layout import WeightLayout

__all__ = [
    "INITIAL_FLAGS",
    "STAGES",
    "TARGETS",
    "Stage",
    "Target",
    "check_order",
    "reducer_builders",
]


class Stage(Protocol):
    """One compression step: a frozen dataclass that is its own configuration."""

    requires: ClassVar[frozenset[str]]
    provides: ClassVar[frozenset[str]]
    forbids: ClassVar[frozenset[str]]

    @property
    def method(self) -> str:
        """The tag that names the stage in a recipe."""

    def apply(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> Checkpoint:
        """Compresses the checkpoint, which it owns from here on."""


class Target(Protocol):
    """One export format: a frozen dataclass that is its own configuration."""

    @property
    def method(self) -> str:
        """The tag that names the target in a recipe."""

    def predict(
        self, spec: ModelSpec, grids: Mapping[LinearSpec, WeightLayout | None]
    ) -> Prediction:
        """What the export would weigh, and what the target cannot run, before any compute."""

    def capacity(self, spec: ModelSpec) -> int:
        """Rows of KV cache that a conversation with the exported model may take."""

    def export(
        self, checkpoint: Checkpoint, folder: Path, ctx: RunContext
    ) -> tuple[Component, ...]:
        """Writes the target's graphs below `folder` and describes them."""


STAGES: tuple[type[Stage], ...] = (
    PruneDepth,
    PruneWidth,
    Magnitude,
    Wanda,
    Gblm,
    SparseGpt,
    ReduceTokens,
    SkipVisual,
    Distill,
    Rotate,
    Awq,
    RoundToNearest,
    Gptq,
    SparseGptGptq,
    Codebook,
    MixedPrecision,
    QuantizeCache,
)
TARGETS: tuple[type[Target], ...] = (ToOnnx, ToCoreml, ToExecutorch)

INITIAL_FLAGS = frozenset({"float_weights", "all_tokens"})
"""What holds of a checkpoint before the first stage."""

# A stage that provides one of a pair takes the other away.
_OPPOSITES = {
    "quantized_weights": "float_weights",
    "reduced_tokens": "all_tokens",
    "ended_tokens": "all_tokens",
}


@dataclass(frozen=True)
class _Flags:
    held: frozenset[str]

    def after(self, stage: Stage) -> _Flags:
        lost = {_OPPOSITES[flag] for flag in stage.provides if flag in _OPPOSITES}
        return _Flags((self.held - lost) | stage.provides)


def check_order(stages: Sequence[Stage], history_flags: frozenset[str] = INITIAL_FLAGS) -> None:
    """Checks that every stage finds what it needs and nothing that it cannot bear.

    Raises:
        RecipeError: A stage stands in the wrong place; the message names it and the flag.
    """
    flags = _Flags(history_flags)
    for index, stage in enumerate(stages):
        missing = sorted(stage.requires - flags.held)
        if missing:
            raise RecipeError(
                f"stages.{index} ({stage.method}): needs {', '.join(missing)}, which no longer "
                "holds here; move it before the stage that takes it away"
            )
        clash = sorted(stage.forbids & flags.held)
        if clash:
            raise RecipeError(
                f"stages.{index} ({stage.method}): cannot follow a stage that leaves "
                f"{', '.join(clash)}"
            )
        flags = flags.after(stage)


def reducer_builders() -> Mapping[str, ReducerBuilder]:
    """How a saved checkpoint gets its visual-token reducer back, by stage tag."""
    builders: dict[str, Any] = {}
    for stage in STAGES:
        build = getattr(stage, "build_reducer", None)
        if build is not None:
            builders[stage.__dataclass_fields__["method"].default] = build  # type: ignore[attr-defined]  # every stage is a dataclass; a protocol cannot say so
    return builders
