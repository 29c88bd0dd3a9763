"""Rounding of a column to affine grids, for the walk of error feedback."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pocketvlm.compress.quantization.affine.grid import GRIDS, AffineScheme, Grid, GridKind

__all__ = ["AffineRounding"]


class AffineRounding:
    """Rounds to an affine grid a group.

    Args:
        scheme: The kind of grid.
        kind: How a group's grid is found.
        rows: Rows of the weight.
        groups: Groups of its columns.
        device: Where they are.
        fixed: Grids [rows, groups] that were made beforehand; `None` makes each from weights that
            carry the errors of the columns before.
        importance: How much an error counts, a group's columns in processing order, for grids
            that are searched; `None` weighs all columns alike.
    """

    def __init__(
        self,
        scheme: AffineScheme,
        kind: GridKind,
        *,
        rows: int,
        groups: int,
        device: torch.device,
        fixed: Grid | None = None,
        importance: Mapping[int, Tensor] | None = None,
    ) -> None:
        self._scheme, self._find = scheme, GRIDS[kind]
        self._is_fixed = fixed is not None
        self._importance = importance
        self._scale = torch.empty(groups, rows, dtype=torch.float64, device=device)
        self._zero = torch.empty_like(self._scale)
        if fixed is not None:
            self._scale.copy_(fixed.scale.T)
            self._zero.copy_(fixed.zero.T)
        self._group = -1

    @property
    def grid(self) -> Grid:
        """The grids of all groups, [rows, groups]."""
        return Grid(
            scale=self._scale.T.contiguous(), zero=self._zero.T.contiguous(), scheme=self._scheme
        )

    def enter_group(self, group: int, weights: Tensor, keeps: Tensor | None = None) -> None:
        """Finds the group's grid, unless all were made beforehand."""
        self._group = group
        if not self._is_fixed:
            weighing = None if self._importance is None else self._importance[group]
            kept = None if keeps is None else keeps.T
            made = self._find(weights.T, self._scheme, weighing, kept)
            self._scale[group], self._zero[group] = made.scale, made.zero

    def round(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds a column to the group's grid."""
        scale, zero, scheme = self._scale[self._group], self._zero[self._group], self._scheme
        codes = weights / scale
        codes = (codes + zero).round_() if scheme.float_zeros else codes.round_().add_(zero)
        codes.clamp_(scheme.lowest, scheme.highest)
        return codes, (codes - zero).mul_(scale)
