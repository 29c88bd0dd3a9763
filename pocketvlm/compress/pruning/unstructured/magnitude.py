"""Magnitude pruning: small weights go; the baseline that every other score has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.hessian import InputHessian
from pocketvlm.compress.pruning.unstructured.patterns import select
from pocketvlm.compress.pruning.unstructured.pruner import LayerPruner, Pruned, Pruner, PruningTask
from pocketvlm.context import RunContext
from pocketvlm.weights.form import WeightForm

__all__ = ["Magnitude"]


@dataclass(frozen=True, kw_only=True)
class Magnitude(Pruner):
    """Keeps the largest |W_ij| of every output row; looks at no picture.

    Published baselines compare over a whole layer (Han et al., arXiv 1506.02626); here it is the
    group of Wanda, so that the two differ in their score alone.
    """

    method: Literal["magnitude"] = "magnitude"

    def begin(
        self,
        checkpoint: Checkpoint,
        tasks: Sequence[PruningTask],
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> LayerPruner:
        """Nothing has to be known beforehand."""
        return _Magnitude()


class _Magnitude(LayerPruner):
    needs_inputs: ClassVar[bool] = False

    def prune(self, task: PruningTask, weight: WeightForm, evidence: InputHessian | None) -> Pruned:
        mask = select(weight.dequantize().abs(), task.pattern, task.kept)
        return Pruned.from_mask(weight, mask)
