"""Rows of a weight, as many at a time as working memory should hold."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pocketvlm.calibration.walk.activations import MAIN_MEMORY
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["count_chunks", "keeps_in", "row_chunks"]

_CHUNK_ELEMENTS = 1024 * 1024


def row_chunks(
    form: WeightForm, device: torch.device = MAIN_MEMORY
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a weight in float64 on a device, as many at a time as working memory should hold."""
    rows, columns = form.shape
    step = _chunk_rows(columns)
    for start in range(0, rows, step):
        chosen = slice(start, min(start + step, rows))
        dense = form.take_rows(torch.arange(chosen.start, chosen.stop))
        yield chosen, dense.to(device, torch.float64)


def count_chunks(rows: int, columns: int) -> int:
    """How many chunks `row_chunks` makes of a weight."""
    return math.ceil(rows / _chunk_rows(columns))


def _chunk_rows(columns: int) -> int:
    return max(1, _CHUNK_ELEMENTS // columns)


def keeps_in(form: WeightForm, rows: slice, device: torch.device = MAIN_MEMORY) -> Tensor | None:
    """Which elements of some rows a mask keeps, bool [rows, columns]; `None` without a mask."""
    if isinstance(form, SparseWeight):
        return form.keeps(torch.arange(rows.start, rows.stop)).to(device)
    return None
