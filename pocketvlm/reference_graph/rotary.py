"""Rotary positions (RoFormer, arXiv 2104.09864), as transformers lays their channels out."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotate_by_position"]


def rotate_by_position(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Queries or keys at their positions.

    Channel i turns together with channel i + head_dim / 2, not with its neighbour as in the paper.

    Args:
        states: [batch, heads, length, head_dim].
        cosine: [batch, length, head_dim], as a stock rotary embedding returns it.
        sine: Likewise.

    Returns:
        The shape of `states`.
    """
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return states * cosine[:, None] + turned * sine[:, None]
