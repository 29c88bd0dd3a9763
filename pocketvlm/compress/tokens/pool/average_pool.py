"""Average pooling: a coarser grid of features. The baseline that keeps something of every patch.

Adaptive average pooling over the grid of visual tokens, as PLLaVA (arXiv 2404.16994) and DeCo
(arXiv 2405.20985) use it, written as one constant matrix so that every runtime can multiply by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.errors import RecipeError
from pocketvlm.models.reducer import PositionPolicy, ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = [
    "AveragePool",
    "ConstantMeans",
    "cell_tokens",
    "nearest_reachable",
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


def nearest_reachable(tokens: tuple[int, int], count: int, *, most: int | None = None) -> int:
    """The number of cells closest to `count` that a grid can have, or 0 where that is wanted."""
    if count == 0:
        return 0
    counts = [found for found in reachable_counts(tokens) if most is None or found <= most]
    return min(counts, key=lambda candidate: abs(candidate - count), default=0)


def pooling_cells(length: int, cells: int) -> tuple[tuple[int, int], ...]:
    """First and past-the-last token of each cell along one side, as adaptive pooling cuts them."""
    return tuple(
        (cell * length // cells, -(-(cell + 1) * length // cells)) for cell in range(cells)
    )


def cell_tokens(tokens: tuple[int, int], grid: tuple[int, int]) -> dict[int, list[int]]:
    """The tokens of each cell of a coarser grid, by the cell's central token."""
    width = tokens[1]
    rows, columns = pooling_cells(tokens[0], grid[0]), pooling_cells(width, grid[1])
    return {
        (top + bottom - 1) // 2 * width + (left + right - 1) // 2: [
            row * width + column for row in range(top, bottom) for column in range(left, right)
        ]
        for top, bottom in rows
        for left, right in columns
    }


class ConstantMeans(TokenReducer):
    """Averages the same tokens of every picture; the means are one product with a constant.

    Args:
        means: The tokens that each kept one is the mean of, by the token at whose place it stands,
            ascending.
        tokens: Visual tokens of a picture, N.
        positions: Which rotary positions the kept ones get.
    """

    weights: Tensor
    places: Tensor

    def __init__(
        self, means: Mapping[int, Sequence[int]], *, tokens: int, positions: PositionPolicy
    ) -> None:
        super().__init__(keep=len(means), positions=positions)
        weights = torch.zeros(len(means), tokens)
        for row, inside in enumerate(means.values()):
            weights[row, list(inside)] = 1 / len(inside)
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("places", torch.tensor(list(means)), persistent=False)

    def forward(self, inputs: ReducerInputs) -> tuple[Tensor, Tensor]:
        """Returns the means [B, k, C] and the indices at which they stand [B, k]."""
        indices = self.places.expand(inputs.features.shape[0], -1)
        return self.weights @ inputs.features, indices


@dataclass(frozen=True, kw_only=True)
class AveragePool(Reducer):
    """Averages the tokens of each cell of a coarser grid; a baseline.

    A share is rounded to the nearest number of tokens that a grid has.
    """

    looks_at_pictures: ClassVar[bool] = False

    kind: Literal["average_pool"] = "average_pool"

    def nearest_count(self, spec: ModelSpec, count: int) -> int:
        """The number of cells closest to `count`."""
        return nearest_reachable((spec.visual_rows, spec.visual_columns), count)

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
        means = cell_tokens(tokens, grid)
        return ConstantMeans(means, tokens=spec.visual_tokens, positions=positions)
