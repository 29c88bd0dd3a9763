"""Rotary positions (RoFormer, arXiv 2104.09864), as transformers lays their channels out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pocketvlm.models.decoder import RopeSpec
from pocketvlm.models.tower import TowerSpec

__all__ = [
    "inverse_frequencies",
    "pair_selection",
    "patch_angles",
    "patch_positions",
    "rotary_angles",
    "rotate_by_position",
]


def inverse_frequencies(rope: RopeSpec) -> Tensor:
    """Angle per position of each pair of channels, float32 [width / 2] (eq. 15)."""
    exponents = torch.arange(0, rope.width, 2).to(torch.float32) / rope.width
    frequencies = 1.0 / rope.theta**exponents
    return frequencies if rope.factor == 1.0 else frequencies / rope.factor


def rotary_angles(rope: RopeSpec, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines at positions, each float32 [batch, length, width].

    Args:
        rope: The kind.
        positions: int64 [batch, length]; [axes, batch, length] where rows may have other positions
            on each axis.
    """
    frequencies = inverse_frequencies(rope).to(positions.device)
    angles = positions[..., None].to(torch.float32) * frequencies
    if positions.dim() == 3:  # noqa: PLR2004  (axes, batch, length)
        chosen = pair_selection(rope).to(positions.device)
        angles = (angles * chosen[:, None, None]).sum(dim=0)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def pair_selection(rope: RopeSpec) -> Tensor:
    """One where an axis turns a pair of channels and zero elsewhere, float32 [axes, width / 2]."""
    axes = torch.tensor(rope.pair_axes)
    return (axes == torch.arange(rope.axes)[:, None]).to(torch.float32)


def patch_angles(tower: TowerSpec) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a tower's patches in raster order, each float32 [1, patches, width].

    The first half of the pairs of a head's channels turns by the row, the other by the column.

    Raises:
        ValueError: The tower does not turn them.
    """
    if tower.rope_theta is None:
        raise ValueError("this tower has no rotary positions")
    frequencies = inverse_frequencies(RopeSpec(theta=tower.rope_theta, width=tower.head_dim // 2))
    row = torch.arange(tower.rows).repeat_interleave(tower.columns)
    column = torch.arange(tower.columns).repeat(tower.rows)
    halves = [place[:, None].to(torch.float32) * frequencies for place in (row, column)]
    angles = torch.cat([*halves, *halves], dim=-1)[None]
    return angles.cos(), angles.sin()


def patch_positions(tower: TowerSpec, table: Tensor) -> Tensor:
    """Learned positions of a tower's tokens, float32 [tokens, hidden].

    Args:
        tower: The tower.
        table: What it has learned, [tokens, hidden], or those of a square that is resampled to the
            picture bilinearly, corner to corner or as centres of cells.
    """
    if tower.table_side is None:
        return table
    square = table.t().view(1, -1, tower.table_side, tower.table_side)
    grid = functional.interpolate(
        square,
        (tower.rows, tower.columns),
        mode="bilinear",
        align_corners=tower.aligns_corners,
    )
    return grid[0].flatten(1).t()


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
