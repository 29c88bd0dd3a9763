"""Stage: one compression step, and `run_stage`, the only place that times and records it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch

from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint, StageRecord
from pocketvlm.context import RunContext
from pocketvlm.machine import package_version, peak_rss_bytes
from pocketvlm.stages.plan_state import PlanState

__all__ = ["Stage", "StageResult", "run_stage"]


@dataclass(frozen=True, kw_only=True, eq=False)
class StageResult:
    """What a stage made of a checkpoint.

    Attributes:
        checkpoint: The compressed checkpoint, without a record of this stage.
        layers: One row per layer for the report, as JSON values.
        metrics: Figures of the stage as a whole, as JSON values.
        notes: What a reader must know: fallbacks, skipped modules, failed bounds.
        is_calibrated: Whether the calibration set has a part in the result.
    """

    checkpoint: Checkpoint
    layers: tuple[Mapping[str, Any], ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    is_calibrated: bool = True


class Stage(ABC):
    """One compression step; a subclass is a frozen dataclass that is its own configuration.

    Attributes:
        requires: Flags that have to hold of the checkpoint (`stages.flags`).
        provides: Flags that hold after the stage.
        forbids: Flags that must not hold.
        carries_taps: Whether it works on models whose tower adds rows to the decoder
            (`ModelSpec.taps`).
        holds_model: Whether it keeps every weight in memory as float32, as one that trains the
            whole model does; others keep a layer, and finished ones lie in files.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    forbids: ClassVar[frozenset[str]] = frozenset()
    carries_taps: ClassVar[bool] = False
    holds_model: ClassVar[bool] = False

    @property
    @abstractmethod
    def method(self) -> str:
        """The tag that names the stage in a recipe."""

    @property
    def uses_device(self) -> bool:
        """Whether the stage computes on the device of a run; else in main memory."""
        return False

    @property
    def shares_work(self) -> bool:
        """Whether processes that share a run divide this stage's work; else the first does it."""
        return False

    @property
    def takes_gradients(self) -> bool:
        """Whether it takes gradients of the whole model, from the answers back to the pictures."""
        return False

    def plan(self, state: PlanState) -> PlanState:
        """What the stage will make of a model, before any compute; by default nothing.

        Raises:
            RecipeError: The stage does not fit the model.
            UnsupportedError: The model lacks what the stage needs.
        """
        return state

    def apply(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> Checkpoint:
        """Compresses a checkpoint, whose model the stage owns from here on, and records it.

        Raises:
            RecipeError: The stage does not fit the checkpoint.
            CalibrationError: A sample cannot be used, or what is measured is not finite.
            CheckpointError: A weight cannot be stored in the stage's form.
            UnsupportedError: The model lacks what the stage needs.
        """
        return run_stage(self, checkpoint, calibration, ctx)

    @abstractmethod
    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """What `apply` does, without clock and record; raises the same errors."""


def run_stage(
    stage: Stage, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
) -> Checkpoint:
    """Runs a stage, times it, measures its memory and appends its record to the history."""
    started = time.perf_counter()
    with _computing_on(ctx.device if stage.uses_device else "cpu", checkpoint):
        result = stage.compress(checkpoint, calibration, ctx)
    notes = result.notes
    if ctx.device != "cpu" and not stage.uses_device:
        notes = (*notes, f"{stage.method} ran in main memory: it does not compute on {ctx.device}")
    record = StageRecord(
        method=stage.method,
        parameters=asdict(stage),  # type: ignore[call-overload]  # every stage is a dataclass; an ABC cannot say so
        version=package_version(),
        calibration_sha256=calibration.sha256 if result.is_calibrated else None,
        layers=result.layers,
        metrics=result.metrics,
        notes=notes,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )
    return result.checkpoint.extend(record)


@contextmanager
def _computing_on(device: str, checkpoint: Checkpoint) -> Iterator[None]:
    """Has a model compute on a device, in whole float32, and brings it back."""
    if device == "cpu":
        yield
        return
    checkpoint.move(torch.device(device))
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        checkpoint.move(torch.device("cpu"))
