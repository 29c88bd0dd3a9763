"""How far a changed layer moves the model's answers: divergence of its next-token distributions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.calibration.walk.partial_forward import PartialForward, suffix_shares
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import CalibrationError
from pocketvlm.weights.form import WeightForm

__all__ = ["DivergenceMeter", "mean_divergence"]


def mean_divergence(reference: Tensor, changed: Tensor) -> float:
    """Mean over tokens of KL(reference || changed), in nats.

    Args:
        reference: Logarithms of probabilities, [tokens, vocabulary].
        changed: Likewise.
    """
    return float((reference.exp() * (reference - changed)).sum(dim=-1).mean())


class DivergenceMeter:
    """Compares the model, with one layer changed, with itself as it was when this was made.

    Layers must be visited in order of execution, as `PartialForward` has it.

    Args:
        checkpoint: The model; its weights must stay as they are while this lives.
        samples: Pictures with questions and answers.

    Attributes:
        tokens: Answer tokens that are compared.

    Raises:
        CalibrationError: A sample cannot be used, or has no answer.
    """

    def __init__(self, checkpoint: Checkpoint, samples: CalibrationSet) -> None:
        self._runner = PartialForward(checkpoint, samples)
        self._shares = suffix_shares(checkpoint.spec)
        self._reference = _log_probabilities(self._runner.logits)
        self.tokens = self._reference.shape[0]

    def share_of_forward(self, name: str) -> float:
        """How much of a whole forward pass one measurement of a layer costs, in segments."""
        return self._shares[name]

    def divergence(self, name: str, form: WeightForm) -> float:
        """Mean KL divergence at the answers' tokens, in nats, with one layer in another form.

        Raises:
            ValueError: A layer after this one was visited before.
            CalibrationError: The changed model's outputs are not finite.
        """
        changed = _log_probabilities(self._runner.logits_with(name, form))
        found = mean_divergence(self._reference, changed)
        if not torch.isfinite(torch.tensor(found)):
            raise CalibrationError(f"{name}: changed to another form, its outputs are not finite")
        return max(found, 0.0)


def _log_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Of all answers' tokens, float64 [tokens, vocabulary].

    Float64, because the divergence of an 8-bit layer is a small difference of large numbers.
    """
    return torch.cat(list(logits)).to(torch.float64).log_softmax(dim=-1)
