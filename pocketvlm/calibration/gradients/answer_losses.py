"""The loss of every sample's answer, of a model as it is or with one layer changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pocketvlm.calibration.data.prompts import Prompt
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.calibration.walk.partial_forward import PartialForward
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import CalibrationError
from pocketvlm.weights.form import WeightForm

__all__ = ["AnswerLosses"]


class AnswerLosses:
    """Mean cross-entropy of each answer's tokens, the end of the answer included.

    Layers must be visited in order of execution, as `PartialForward` has it.

    Args:
        checkpoint: The model; its weights must stay as they are while this lives.
        samples: Pictures with questions and answers.

    Attributes:
        plain: float64 [samples], of the model as it is.

    Raises:
        CalibrationError: A sample cannot be used, has no answer, or its loss is not finite.
    """

    def __init__(self, checkpoint: Checkpoint, samples: CalibrationSet) -> None:
        self._runner = PartialForward(checkpoint, samples)
        self.plain = _losses(self._runner.prompts, self._runner.logits)
        finite = torch.isfinite(self.plain)
        if not bool(finite.all()):
            where = self._runner.prompts[int((~finite).nonzero()[0])].where
            raise CalibrationError(f"{where}: the loss of its answer is not finite")

    def with_form(self, name: str, form: WeightForm) -> Tensor:
        """Like `plain`, with one layer in another form; its own is put back in any case.

        Raises:
            ValueError: A layer after this one was visited before.
            CalibrationError: A loss is not finite.
        """
        found = _losses(self._runner.prompts, self._runner.logits_with(name, form))
        finite = torch.isfinite(found)
        if not bool(finite.all()):
            where = self._runner.prompts[int((~finite).nonzero()[0])].where
            raise CalibrationError(
                f"{where}: the loss of its answer is not finite with {name} in another form"
            )
        return found


def _losses(prompts: Sequence[Prompt], logits: Sequence[Tensor]) -> Tensor:
    # Float64, because a finite difference is a small one of large numbers.
    return torch.stack(
        [
            functional.cross_entropy(
                values.cpu().to(torch.float64),
                torch.tensor(prompt.token_ids[prompt.answer_start : prompt.answer_end]),
            )
            for prompt, values in zip(prompts, logits, strict=True)
        ]
    )
