"""Look-up tables and vector codebooks with error feedback, fitted to images and text.

VPTQ (Liu et al., arXiv 2409.17066) on the walk that every calibrated quantizer shares; with vectors
of one element, data-driven look-up tables. Small layers share codebooks, which are fitted to all of
them before the walk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.calibrated import CalibratedQuantizer
from pocketvlm.compress.quantization.codebook.quantizer import CodebookQuantizer
from pocketvlm.compress.quantization.codebook.rules import CodebookRule
from pocketvlm.compress.quantization.codebook.shared import assign_owners, fit_shared_codebooks
from pocketvlm.compress.quantization.rules import Assignment, assign_rules_to, require_rules
from pocketvlm.context import RunContext
from pocketvlm.stages import PlanState, StageResult

__all__ = ["Codebook", "CodebookRule"]


@dataclass(frozen=True, kw_only=True)
class Codebook(CalibratedQuantizer):
    """Quantizes to look-up tables and vector codebooks, calibrated on images and text.

    Attributes:
        rules: Indices and vectors; the first rule that matches a layer wins.
        error_feedback: Whether columns make up for each other's errors; without it, tables come
            from weighted k-means alone.
        rounds: Times that codes are chosen; tables are refined after each.
        tune_steps: Steps of gradient descent on a finished sublayer's output, which train
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
        require_rules(self.rules)
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

    @property
    def uses_device(self) -> bool:
        """Forward passes and moments; tables are fitted, and tuned, in main memory."""
        return self.tune_steps == 0

    @property
    def shares_work(self) -> bool:
        """Moments are those of the samples of all processes; what is tuned sees them in turn."""
        return self.tune_steps == 0

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

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Quantizes the checkpoint in place; raises what `quantize` raises.

        Raises:
            RecipeError: Layers that share codebooks have fewer vectors than entries.
        """

        def begin(assignments: Sequence[Assignment[CodebookRule]]) -> CodebookQuantizer:
            readers = ((item.rule, item.linear) for item in assignments)
            return CodebookQuantizer(
                feedback=self.feedback,
                shared=fit_shared_codebooks(checkpoint, readers, ctx.seed),
                seed=ctx.seed,
                rounds=self.rounds,
                error_feedback=self.error_feedback,
                tune_steps=self.tune_steps,
                tune_rate=self.tune_rate,
            )

        return self.quantize(
            checkpoint,
            calibration,
            ctx,
            rules=self.rules,
            begin=begin,
            # Projector, table and head stand in no sublayer that would be finished.
            revised=lambda item: self.tune_steps > 0 and item.linear.block is not None,
        )
