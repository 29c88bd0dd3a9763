"""What pruning measures beforehand, once for all rows of a benchmark that need it.

Neither a ratio nor a pattern, nor alpha or the groups of a budget, changes gradients and scores of
the dense model. They are kept in a folder for every model and calibration set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.unstructured.allocation import Budget
from pocketvlm.compress.pruning.unstructured.ecoflap import Ecoflap
from pocketvlm.compress.pruning.unstructured.gblm import Gblm
from pocketvlm.compress.pruning.unstructured.patterns import Pattern
from pocketvlm.compress.pruning.unstructured.score import LayerPruner, PruningTask
from pocketvlm.context import RunContext
from pocketvlm.models.layers import LinearSpec

__all__ = ["SharedEcoflap", "SharedGblm"]


@dataclass(frozen=True, kw_only=True)
class SharedGblm(Gblm):
    """GBLM whose gradients outlast the stage.

    Attributes:
        folder: Where they are kept.
        samples: Those that gradients are taken of; `None` for the ones that the stage is given.
    """

    folder: Path
    samples: CalibrationSet | None = None

    def begin(
        self,
        checkpoint: Checkpoint,
        tasks: Sequence[PruningTask],
        calibration: CalibrationSet,
        held_out: float,
        ctx: RunContext,
    ) -> LayerPruner:
        """What the score says, from the shared folder."""
        samples = calibration if self.samples is None else self.samples
        label = f"gblm {self.gradient} {self.norm}{' shrunk' if self.shrink else ''}"
        shared = _share(self.folder, label, checkpoint, samples, ctx)
        return super().begin(checkpoint, tasks, samples, held_out, shared)


@dataclass(frozen=True, kw_only=True)
class SharedEcoflap(Ecoflap):
    """ECoFLaP whose scores outlast the stage.

    Attributes:
        folder: Where they are kept.
    """

    folder: Path

    def allocate(
        self,
        checkpoint: Checkpoint,
        layers: Sequence[LinearSpec],
        ratio: float,
        pattern: Pattern,
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> Budget:
        """What the allocation says, from the shared folder."""
        label = f"ecoflap {self.order} {self.noise:g} {self.draws} {self.samples}"
        shared = _share(self.folder, label, checkpoint, calibration, ctx)
        return super().allocate(checkpoint, layers, ratio, pattern, calibration, shared)


def _share(
    folder: Path, label: str, checkpoint: Checkpoint, samples: CalibrationSet, ctx: RunContext
) -> RunContext:
    """The run, with a scratch folder that belongs to a model, its samples and what is measured."""
    own = folder / f"{checkpoint.source.sha256[:12]} {samples.sha256[:12]}" / label
    own.mkdir(parents=True, exist_ok=True)
    return ctx.with_scratch(own)
