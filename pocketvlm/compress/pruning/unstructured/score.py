"""The contract of a score of weights; `pruner.Score` is the table of those that there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.hessian import NO_FEEDBACK, ErrorFeedback, InputHessian
from pocketvlm.compress.pruning.unstructured.patterns import Pattern, select
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError
from pocketvlm.models.layers import LinearSpec
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["LayerPruner", "Pruned", "PruningScore", "PruningTask", "prune_by_score"]


@dataclass(frozen=True, kw_only=True)
class PruningTask:
    """One layer that is to be pruned.

    Attributes:
        linear: The layer.
        pattern: Which elements may be removed together.
        kept: How many elements it keeps.
    """

    linear: LinearSpec
    pattern: Pattern
    kept: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Pruned:
    """What a method made of a layer.

    Attributes:
        mask: bool [rows, columns], true for what is kept.
        form: The weight; zero wherever the mask is false.
        figures: More for the layer's row in the report, as JSON values.
    """

    mask: Tensor
    form: WeightForm
    figures: Mapping[str, Any]


class LayerPruner(ABC):
    """Prunes the layers of one run."""

    needs_inputs: ClassVar[bool] = True

    @property
    def feedback(self) -> ErrorFeedback:
        """How the Hessians that `prune` reads are factorized, where it asks for factors."""
        return NO_FEEDBACK

    @abstractmethod
    def prune(self, task: PruningTask, weight: WeightForm, hessian: InputHessian | None) -> Pruned:
        """Chooses what a layer keeps.

        Args:
            task: The layer and how much of it is kept.
            weight: Its float weight.
            hessian: Of its input; `None` for a score that needs no inputs.

        Raises:
            CalibrationError: A score is not finite.
            UnsupportedError: A kept value is too large for float16.
        """


class PruningScore(LayerPruner):
    """What a weight is worth: a frozen dataclass that is its own configuration.

    A score that has to know nothing beforehand prunes layers itself; any other returns from
    `begin` what does.
    """

    @property
    @abstractmethod
    def kind(self) -> str:
        """The tag that names it in a recipe."""

    @property
    def takes_gradients(self) -> bool:
        """Whether it takes gradients of the whole model."""
        return False

    def begin(
        self,
        checkpoint: Checkpoint,
        tasks: Sequence[PruningTask],
        calibration: CalibrationSet,
        held_out: float,
        ctx: RunContext,
    ) -> LayerPruner:
        """Measures what has to be known before the first layer.

        Args:
            checkpoint: The dense model.
            tasks: The layers that will be pruned.
            calibration: All samples.
            held_out: Share of them, from the end, that only judges.
            ctx: The run.

        Raises:
            CalibrationError: A sample cannot be used, or what is measured is not finite.
        """
        return self


def prune_by_score(
    task: PruningTask,
    weight: WeightForm,
    scores: Tensor,
    figures: Mapping[str, Any] | None = None,
) -> Pruned:
    """Keeps the elements of the highest score as they are.

    Args:
        task: The layer and how much of it is kept.
        weight: Its float weight.
        scores: [rows, columns].
        figures: More for the layer's row in the report.

    Raises:
        CalibrationError: A score is not finite.
    """
    if not bool(torch.isfinite(scores).all()):
        raise CalibrationError("its score is not finite on the calibration data")
    mask = select(scores, task.pattern, task.kept)
    return Pruned(mask=mask, form=SparseWeight.from_form(weight, mask), figures=figures or {})
