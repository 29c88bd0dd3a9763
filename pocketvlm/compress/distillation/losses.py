"""How far a student is from its teacher, and from the answers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["answer_cross_entropy", "feature_distance", "logit_divergence"]


def logit_divergence(
    teacher: Tensor, student: Tensor, shares: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student) of tempered distributions times T^2, summed with the tokens' shares.

    Hinton et al., arXiv 1503.02531, section 2: gradients of tempered logits shrink with 1 / T^2,
    and the factor keeps their size. The result is a sum over samples of means over their tokens.

    Args:
        teacher: Logits [tokens, vocabulary].
        student: Likewise.
        shares: [tokens].
        temperature: T, above 0.
    """
    wanted = (teacher / temperature).log_softmax(dim=-1)
    found = (student / temperature).log_softmax(dim=-1)
    each = (wanted.exp() * (wanted - found)).sum(dim=-1)
    return temperature**2 * (each * shares).sum()


def answer_cross_entropy(student: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy of the answers' tokens, summed with their shares.

    Args:
        student: Logits [tokens, vocabulary].
        labels: int64 [tokens].
        shares: [tokens].
    """
    return (functional.cross_entropy(student, labels, reduction="none") * shares).sum()


def feature_distance(teacher: Tensor, student: Tensor, shares: Tensor) -> Tensor:
    """Squared distance of feature vectors relative to the teacher's own size, summed with shares.

    What follows a feature is a norm or reads its direction, so an error counts in proportion to
    the feature's length.

    Args:
        teacher: [vectors, width].
        student: Likewise.
        shares: [vectors].
    """
    size = teacher.square().mean(dim=-1).clamp_min(torch.finfo(teacher.dtype).tiny)
    return ((student - teacher).square().mean(dim=-1) / size * shares).sum()
