"""Quantizing with a rule of its own kind for each layer: integers here, codebooks there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.walk.walk import LinearGroup
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.layer_store import FinishedLayer
from pocketvlm.compress.quantization.affine.gptq import AffineFitter
from pocketvlm.compress.quantization.affine.grid import GridKind
from pocketvlm.compress.quantization.affine.rules import Assignment, WeightRule
from pocketvlm.compress.quantization.calibrated import CalibratedQuantizer, GroupQuantizer
from pocketvlm.compress.quantization.codebook.shared import (
    SharedKey,
    codebook_fitter,
    fit_shared_codebooks,
)
from pocketvlm.compress.quantization.layer_quantizer import LayerQuantizer
from pocketvlm.compress.quantization.mixed.search_space import Option
from pocketvlm.context import RunContext
from pocketvlm.models.spec import LinearSpec

__all__ = ["PerLayerQuantizer"]

_ROUNDS = 3  # times that codes are chosen; tables are refined behind each


@dataclass(frozen=True, kw_only=True)
class PerLayerQuantizer(CalibratedQuantizer[Option]):
    """Quantizes every layer by the rule that was chosen for it.

    Attributes:
        rules: Of both kinds.
        grid: How a group's grid is found.
        static_groups: Whether grids are made from the weights as they were.
    """

    method: Literal["mixed"] = "mixed"
    rules: tuple[Option, ...]
    grid: GridKind = "min_max"
    static_groups: bool = False

    def begin(
        self,
        checkpoint: Checkpoint,
        assignments: Sequence[Assignment[Option]],
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> GroupQuantizer[Option]:
        """Fits codebooks that several layers share."""
        return self.begin_with(
            checkpoint, ((item.rule, item.linear) for item in assignments), ctx.seed
        )

    def begin_with(
        self,
        checkpoint: Checkpoint,
        readers: Iterable[tuple[Option | None, LinearSpec]],
        seed: int,
    ) -> GroupQuantizer[Option]:
        """The same for layers that may take several rules.

        Raises:
            RecipeError: Layers that share codebooks have fewer vectors than entries.
        """
        return _ByRule(self, fit_shared_codebooks(checkpoint, readers, seed), seed)

    def quantize_step(
        self,
        checkpoint: Checkpoint,
        step: LinearGroup,
        assignments: Sequence[Assignment[Option]],
        block: int | None,
        fitter: GroupQuantizer[Option],
    ) -> Mapping[str, FinishedLayer]:
        """Quantizes layers of one step, and puts them nowhere."""
        return self._quantize(checkpoint, step, assignments, block, fitter)


class _ByRule(GroupQuantizer[Option]):
    """Each kind of rule has its own fitter."""

    def __init__(
        self, stage: PerLayerQuantizer, shared: Mapping[SharedKey, Tensor], seed: int
    ) -> None:
        self._stage, self._shared, self._seed = stage, shared, seed

    def fitter_of(self, assignment: Assignment[Option]) -> LayerQuantizer[Any]:
        rule, linear = assignment.rule, assignment.linear
        if rule is None:
            raise ValueError(f"{linear.name} is not to be quantized")
        if isinstance(rule, WeightRule):
            return AffineFitter(grid=self._stage.grid, static_groups=self._stage.static_groups)
        return codebook_fitter(
            rule, linear, self._shared, seed=self._seed, rounds=_ROUNDS, error_feedback=True
        )
