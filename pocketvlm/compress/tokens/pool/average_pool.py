"""Average pooling: a coarser grid of features. The baseline that keeps something of every patch.

Adaptive average pooling over the grid of visual tokens, as PLLaVA (arXiv 2404.16994) and DeCo
(arXiv 2405.20985) use it, written as one constant matrix so that every runtime can multiply by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Literal

import torch
from torch import Tensor

from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.errors import RecipeError
from pocketvlm.models.reducer import PositionPolicy, ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = [
    "AveragePool",
    "AveragePoolReducer",
    "pooled_grid",
    "pooling_cells",
    "reachable_counts",
]


def pooled_grid(tokens: tuple[int, int], keep: int) -> tuple[int, int] | None:
    """Rows and columns of the grid of `keep` cells whose cells are the squarest.

    Cells are at most twice as high as wide: 32 of 8 x 8 tokens are a grid of 4 x 8.

    Args:
        tokens: Rows and columns of visual tokens.
        keep: Cells.

    Returns:
        The grid, or `None` where there is none.
    """
    height, width = tokens
    for rows in range(min(isqrt(keep * height // width), height), 0, -1):
        columns = keep // rows
        if rows * columns == keep:
            fits = columns <= width and columns * height <= 2 * rows * width
            return (rows, columns) if fits else None
    return None


def reachable_counts(tokens: tuple[int, int]) -> tuple[int, ...]:
    """Every number of cells that pooling a grid of tokens can leave, ascending."""
    return tuple(keep for keep in range(1, tokens[0] * tokens[1] + 1) if pooled_grid(tokens, keep))


def pooling_cells(length: int, cells: int) -> tuple[tuple[int, int], ...]:
    """First and past-the-last token of each cell along one side, as adaptive pooling cuts them."""
    return tuple(
        (cell * length // cells, -(-(cell + 1) * length // cells)) for cell in range(cells)
    )


class AveragePoolReducer(TokenReducer):
    """Averages the tokens of each cell; a cell's index is that of its central token."""

    weights: Tensor
    centres: Tensor

    def __init__(
        self, *, tokens: tuple[int, int], grid: tuple[int, int], positions: PositionPolicy
    ) -> None:
        super().__init__(keep=grid[0] * grid[1], positions=positions)
        height, width = tokens
        weights = torch.zeros(self.keep, height * width)
        centres = []
        rows, columns = pooling_cells(height, grid[0]), pooling_cells(width, grid[1])
        boxes = [(row, column) for row in rows for column in columns]
        for cell, ((top, bottom), (left, right)) in enumerate(boxes):
            inside = [r * width + c for r in range(top, bottom) for c in range(left, right)]
            weights[cell, inside] = 1 / len(inside)
            centres.append((top + bottom - 1) // 2 * width + (left + right - 1) // 2)
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("centres", torch.tensor(centres), persistent=False)

    def forward(self, inputs: ReducerInputs) -> tuple[Tensor, Tensor]:
        """Returns pooled features [B, k, C] and the indices of their centres [B, k]."""
        indices = self.centres.expand(inputs.features.shape[0], -1)
        return self.weights @ inputs.features, indices


@dataclass(frozen=True, kw_only=True)
class AveragePool(Reducer):
    """Averages the tokens of each cell of a coarser grid; a baseline.

    A share is rounded to the nearest number of tokens that a grid has.
    """

    kind: Literal["average_pool"] = "average_pool"

    def nearest_count(self, spec: ModelSpec, count: int) -> int:
        """The number of cells closest to `count`."""
        counts = reachable_counts((spec.visual_rows, spec.visual_columns))
        return min(counts, key=lambda candidate: abs(candidate - count))

    def build(self, spec: ModelSpec, *, keep: int, positions: PositionPolicy) -> TokenReducer:
        """The module of one model.

        Raises:
            RecipeError: No grid has `keep` cells.
        """
        tokens = (spec.visual_rows, spec.visual_columns)
        grid = pooled_grid(tokens, keep)
        if grid is None:
            counts = reachable_counts(tokens)
            below = [count for count in counts if count < keep]
            above = [count for count in counts if count > keep]
            nearest = " and ".join(map(str, [*below[-1:], *above[:1]]))
            raise RecipeError(
                f"reduce_tokens: keep {keep}: average_pool cannot cut {tokens[0]} x {tokens[1]} "
                f"visual tokens into that many cells; the nearest counts that it can are {nearest}"
            )
        return AveragePoolReducer(tokens=tokens, grid=grid, positions=positions)
