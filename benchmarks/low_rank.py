"""Linear layers with an update of low rank beside them (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["LowRank", "merge", "widen"]


class LowRank(nn.Module):
    """A frozen linear layer with an update of low rank.

    Args:
        linear: The layer.
        rank: Of the update.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's outputs, [..., outputs]."""
        update = functional.linear(functional.linear(inputs, self.down), self.up)
        return self.linear(inputs) + update

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The layer with its update inside."""
        self.linear.weight += self.up @ self.down
        return self.linear


def widen(decoder: nn.Module, rank: int) -> list[nn.Parameter]:
    """Puts an update beside every linear layer; all their parameters.

    Args:
        decoder: Changed in place.
        rank: Of the updates.
    """
    found: list[nn.Parameter] = []
    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                layer = LowRank(child, rank)
                setattr(parent, name, layer)
                found += [layer.down, layer.up]
    return found


def merge(decoder: nn.Module) -> None:
    """Puts all updates inside their layers, in place."""
    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LowRank):
                setattr(parent, name, child.merged())
