"""How much a visual token counts relative to a text token.

An image costs hundreds of tokens and a question a few dozen, so an unweighted Hessian is mostly
visual, although errors on words cost the answer more (MBQ, arXiv 2412.19509; VLMQ, 2508.03351). In
GPTQ a weight per token is one factor: H = sum_t w_t x_t x_t^T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["ModalityWeighting", "TokenCounts", "check_weighting", "token_weights"]

ModalityWeighting = Literal["uniform", "balanced", "gradient"] | float
"""`uniform`: all tokens alike; `balanced`: both modalities weigh the same in total; `gradient`:
each token by how much the answer's loss changes with it (`calibration.gradients`); a number: the
weight of a visual token relative to a text token."""

_WORDS = ("uniform", "balanced", "gradient")


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Tokens that enter the decoder, over a whole calibration set.

    Attributes:
        visual: Tokens that came from images, after any reduction.
        text: All others.
    """

    visual: int
    text: int

    @property
    def ratio(self) -> float | None:
        """Visual tokens per text token; `None` if there is no text."""
        return self.visual / self.text if self.text else None


def check_weighting(weighting: ModalityWeighting) -> None:
    """Checks a weighting's value.

    Raises:
        ValueError: It is neither a known word nor a finite number that is not negative.
    """
    if isinstance(weighting, str):
        if weighting not in _WORDS:
            raise ValueError(
                f"modality_weights {weighting!r} is unknown; allowed are "
                f"{', '.join(map(repr, _WORDS))} or the weight of a visual token"
            )
    elif not math.isfinite(weighting) or weighting < 0:
        raise ValueError(f"modality_weights must be at least 0 and finite, not {weighting}")


def token_weights(
    weighting: ModalityWeighting, counts: TokenCounts, is_visual: Tensor
) -> Tensor | None:
    """Weights that depend on modality alone, float32 of the shape of `is_visual`.

    Returns:
        The weights; `None` if all are equal.

    Raises:
        ValueError: The weighting is `gradient`, which differs by token and by block.
    """
    if weighting == "uniform":
        return None
    if weighting == "gradient":
        raise ValueError(
            "modality does not decide a gradient weight; it comes from a TokenImportance"
        )
    visual = weighting if isinstance(weighting, int | float) else _balance(counts)
    return torch.where(is_visual, visual, 1.0).to(torch.float32)


def _balance(counts: TokenCounts) -> float:
    return counts.text / counts.visual if counts.visual and counts.text else 1.0
