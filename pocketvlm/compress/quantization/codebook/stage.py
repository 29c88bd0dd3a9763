"""Look-up tables and vector codebooks with error feedback, fitted to images and text.

VPTQ (Liu et al., arXiv 2409.17066) on the walk that every calibrated quantizer shares; with vectors
of one element, data-driven look-up tables. Small layers share codebooks, which are fitted to all of
them before the walk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.walk.walk import FinishedSublayer, LinearGroup
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.layer_store import FinishedLayer
from pocketvlm.compress.quantization.affine.rules import Assignment, assign_rules_to
from pocketvlm.compress.quantization.calibrated import CalibratedQuantizer, GroupQuantizer
from pocketvlm.compress.quantization.codebook.fit import CodebookFitter
from pocketvlm.compress.quantization.codebook.rules import CodebookRule
from pocketvlm.compress.quantization.codebook.shared import (
    SharedKey,
    assign_owners,
    codebook_fitter,
    fit_shared_codebooks,
)
from pocketvlm.compress.quantization.codebook.tuning import tune_codebooks
from pocketvlm.context import RunContext
from pocketvlm.stages import PlanState

__all__ = ["Codebook", "CodebookRule"]


@dataclass(frozen=True, kw_only=True)
class Codebook(CalibratedQuantizer[CodebookRule]):
    """Quantizes to look-up tables and vector codebooks, calibrated on images and text.

    Attributes:
        rules: Indices and vectors; the first rule that matches a layer wins.
        error_feedback: Whether columns make up for each other's errors; without it, tables come
            from weighted k-means alone.
        rounds: Times that codes are chosen; tables are refined behind each.
        tune_steps: Steps of gradient descent on a finished half block's output, which train
            tables and row scales; 0 leaves them as they are and spares a second forward pass.
        tune_rate: Their rate, in units of each table's root mean square.
    """

    method: Literal["codebook"] = "codebook"
    rules: tuple[CodebookRule, ...]
    error_feedback: bool = True
    rounds: int = 3
    tune_steps: int = 0
    tune_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, not {self.rounds}")
        if self.tune_steps < 0:
            raise ValueError(f"tune_steps must be at least 0, not {self.tune_steps}")
        if not 0 < self.tune_rate <= 1:
            raise ValueError(f"tune_rate must lie above 0 and at most at 1, not {self.tune_rate}")

    @property
    def carries_float(self) -> bool:
        """Whether the float model has to run along."""
        return self.tune_steps > 0 or self.drift_share > 0

    def plan(self, state: PlanState) -> PlanState:
        """Gives each layer the layout of its rule; shared codebooks belong to their first layer."""
        return state.with_layouts(
            assign_owners(
                {
                    item.linear: (
                        item.rule,
                        None if item.rule is None else item.rule.plan(item.linear),
                    )
                    for item in assign_rules_to(self.rules, state.spec.linears())
                }
            )
        )

    def begin(
        self,
        checkpoint: Checkpoint,
        assignments: Sequence[Assignment[CodebookRule]],
        calibration: CalibrationSet,
        ctx: RunContext,
    ) -> GroupQuantizer[CodebookRule]:
        """Fits codebooks that several layers share.

        Raises:
            RecipeError: Layers that share codebooks have fewer vectors than entries.
        """
        readers = ((item.rule, item.linear) for item in assignments)
        return _Codebooks(self, fit_shared_codebooks(checkpoint, readers, ctx.seed), ctx.seed)

    def _quantize(
        self,
        checkpoint: Checkpoint,
        step: LinearGroup,
        assignments: Sequence[Assignment[CodebookRule]],
        block: int | None,
        fitter: GroupQuantizer[CodebookRule],
    ) -> dict[str, FinishedLayer]:
        made = super()._quantize(checkpoint, step, assignments, block, fitter)
        if not self.tune_steps:
            return made
        # Projector, table and head stand in no half block that would be finished.
        waits = {item.linear.name: item.linear.block is not None for item in assignments}
        return {
            name: replace(layer, row={**layer.row, "tuned": False}) if waits[name] else layer
            for name, layer in made.items()
        }


class _Codebooks(GroupQuantizer[CodebookRule]):
    def __init__(
        self,
        stage: Codebook,
        shared: Mapping[SharedKey, Tensor],
        seed: int,
    ) -> None:
        self._stage, self._shared, self._seed = stage, shared, seed

    def fitter_of(self, assignment: Assignment[CodebookRule]) -> CodebookFitter:
        rule, linear = assignment.rule, assignment.linear
        if rule is None:
            raise ValueError(f"{linear.name} is not to be quantized")
        return codebook_fitter(
            rule,
            linear,
            self._shared,
            seed=self._seed,
            rounds=self._stage.rounds,
            error_feedback=self._stage.error_feedback,
        )

    def tune(
        self, checkpoint: Checkpoint, half: FinishedSublayer, layers: Mapping[str, FinishedLayer]
    ) -> Mapping[str, FinishedLayer]:
        """Trains tables and row scales on the half block's output."""
        return tune_codebooks(
            checkpoint, half, layers, steps=self._stage.tune_steps, rate=self._stage.tune_rate
        )
