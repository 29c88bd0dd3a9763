"""A weight and what is divided out of it before its vectors are clustered."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pocketvlm.compress.quantization.codebook.rules import CodebookRule

__all__ = ["NormalizedWeight", "normalize", "rescale", "row_scales_of"]

_LEAST_SCALE = 2.0**-14
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class NormalizedWeight:
    """A weight and what was divided out of it.

    Attributes:
        values: float32 [columns, rows].
        row_scales: float16 [rows], or `None`.
        column_scales: float16 [columns], or `None`.
        column_offsets: float16 [columns], or `None`.
        rows_alike: Whether errors count in proportion to their row's scale.
        keeps: Which elements a mask keeps, bool [columns, rows]; `None` for all.
    """

    values: Tensor
    row_scales: Tensor | None = None
    column_scales: Tensor | None = None
    column_offsets: Tensor | None = None
    rows_alike: bool = False
    keeps: Tensor | None = None

    @property
    def importance(self) -> Tensor:
        """How much an error in each row counts, [rows]."""
        if self.row_scales is None or self.rows_alike:
            return torch.ones(self.values.shape[1])
        return self.row_scales.to(torch.float32).square()

    @property
    def stretch(self) -> Tensor:
        """How much an error in each column counts, beside its input, [columns]."""
        if self.column_scales is None:
            return torch.ones(self.values.shape[0])
        return self.column_scales.to(torch.float32)


def row_scales_of(weights: Tensor, keeps: Tensor | None = None) -> Tensor:
    """Root mean square of every row of [rows, columns], float16; one for rows of zeros.

    The mean is over those elements that a mask keeps, bool [rows, columns], where there is one.
    """
    found = []
    step = max(1, _CHUNK_ELEMENTS // weights.shape[1])
    for start in range(0, weights.shape[0], step):
        squares = weights[start : start + step].to(torch.float64).square_()
        if keeps is None:
            found.append(squares.mean(1))
            continue
        kept = keeps[start : start + step]
        found.append(squares.masked_fill_(~kept, 0.0).sum(1) / kept.sum(1).clamp_min(1))
    return _as_scales(torch.cat(found).sqrt())


def normalize(
    weights: Tensor, rule: CodebookRule, *, rows_alike: bool, keeps: Tensor | None
) -> NormalizedWeight:
    """Divides scales out of [columns, rows], for a mask [rows, columns]."""
    turned = None if keeps is None else keeps.T.contiguous()
    if rule.normalize == "rows":
        scales = row_scales_of(weights.T, keeps)
        values = weights / scales.to(torch.float32)
        return NormalizedWeight(
            values=values, row_scales=scales, rows_alike=rows_alike, keeps=turned
        )
    if rule.normalize == "columns":
        offsets = weights.mean(1).to(torch.float16)
        centred = weights - offsets.to(torch.float32)[:, None]
        scales = row_scales_of(centred)
        return NormalizedWeight(
            values=centred / scales.to(torch.float32)[:, None],
            column_scales=scales,
            column_offsets=offsets,
        )
    return NormalizedWeight(values=weights, keeps=turned)


def rescale(normal: NormalizedWeight, original: Tensor, found: Tensor) -> NormalizedWeight:
    """The weight over row scales that suit what its rows were rounded to, where those are sane."""
    scales = normal.row_scales
    if scales is None:
        return normal
    before = scales.to(torch.float32)
    # A scale far off belongs to a row whose codes say nothing about it.
    usable = torch.isfinite(found) & (found > before / 2) & (found < before * 2)
    scales = _as_scales(torch.where(usable, found, before))
    return replace(normal, values=original / scales.to(torch.float32), row_scales=scales)


def _as_scales(values: Tensor) -> Tensor:
    scales = torch.where(values > 0, values.clamp_min(_LEAST_SCALE), 1.0).to(torch.float16)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("a weight is too large for a float16 scale")
    return scales
