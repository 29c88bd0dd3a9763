"""Rotary positions (RoFormer, arXiv 2104.09864), as transformers lays their channels out."""

from __future__ import annotations

import torch
from torch import Tensor

from pocketvlm.models.spec import RopeSpec

__all__ = ["inverse_frequencies", "rotary_angles", "rotate_by_position"]


def inverse_frequencies(rope: RopeSpec) -> Tensor:
    """Angle per position of each pair of channels, float32 [width / 2] (eq. 15)."""
    exponents = torch.arange(0, rope.width, 2).to(torch.float32) / rope.width
    return 1.0 / rope.theta**exponents


def rotary_angles(rope: RopeSpec, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines at positions, each float32 [batch, length, width].

    Args:
        rope: The kind.
        positions: int64 [batch, length].
    """
    angles = positions[..., None].to(torch.float32) * inverse_frequencies(rope)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate_by_position(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Queries or keys at their positions.

    Channel i turns together with channel i + width / 2, not with its neighbour as in the paper.

    Args:
        states: [batch, heads, length, width].
        cosine: [batch, length, width].
        sine: Likewise.

    Returns:
        The shape of `states`.
    """
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return states * cosine[:, None] + turned * sine[:, None]
