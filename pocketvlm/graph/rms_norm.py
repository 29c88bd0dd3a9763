"""RMSNorm (arXiv 1910.07467), rounded as the stock modules of transformers round it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """Scales channels by the inverse root of their mean square, then by a weight each."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)
        self.eps = eps

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., width] to the same."""
        mean = inputs.pow(2).mean(-1, keepdim=True)
        return self.weight * (inputs * torch.rsqrt(mean + self.eps))
