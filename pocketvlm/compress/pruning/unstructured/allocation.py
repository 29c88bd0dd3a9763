"""How a budget of weights is shared out among layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.unstructured.patterns import Pattern
from pocketvlm.context import RunContext
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.spec import ModelSpec

__all__ = ["Allocation", "Budget", "Uniform", "uniform_counts"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every layer may keep.

    Attributes:
        kept: Elements that a layer keeps, by its name.
        rows: What a report says of each group of layers, as JSON values.
        metrics: Figures of the allocation as a whole.
        notes: What a reader must know.
    """

    kept: Mapping[str, int]
    rows: tuple[Mapping[str, Any], ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Allocation(Protocol):
    """A way to share out: a frozen dataclass that is its own configuration."""

    @property
    def takes_gradients(self) -> bool:
        """Whether it takes gradients of the whole model."""

    def check(self, ratio: float, pattern: Pattern) -> None:
        """Refuses what leaves nothing to share out, or no room; a `ValueError` says why."""

    def allocate(
        self,
        checkpoint: Checkpoint,
        layers: Sequence[LinearSpec],
        ratio: float,
        pattern: Pattern,
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> Budget:
        """Says what every layer keeps; together as much as `uniform_counts` says."""

    def plan_notes(self, spec: ModelSpec, layers: Sequence[LinearSpec]) -> tuple[str, ...]:
        """What the allocation will cost, before any compute."""


def uniform_counts(layers: Sequence[LinearSpec], ratio: float, pattern: Pattern) -> dict[str, int]:
    """Elements that every layer keeps where all lose the same share, each rounded by itself."""
    unit = pattern.elements
    return {
        layer.name: max(
            unit, round((1 - ratio) * layer.out_features * layer.in_features / unit) * unit
        )
        for layer in layers
    }


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Every layer loses the same share."""

    kind: Literal["uniform"] = "uniform"

    @property
    def takes_gradients(self) -> bool:
        """Never."""
        return False

    def check(self, ratio: float, pattern: Pattern) -> None:
        """Every ratio and pattern will do."""

    def allocate(
        self,
        checkpoint: Checkpoint,
        layers: Sequence[LinearSpec],
        ratio: float,
        pattern: Pattern,
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> Budget:
        """The same share of each layer."""
        return Budget(kept=uniform_counts(layers, ratio, pattern))

    def plan_notes(self, spec: ModelSpec, layers: Sequence[LinearSpec]) -> tuple[str, ...]:
        """It costs nothing."""
        return ()
