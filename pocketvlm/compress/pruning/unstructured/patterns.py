"""Which elements may be removed together: one by one, N of M, or whole blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pocketvlm.errors import RecipeError
from pocketvlm.models.layers import LinearSpec

__all__ = [
    "Blocked",
    "Pattern",
    "SemiStructured",
    "Unstructured",
    "keep_highest",
    "select",
]

_SORTED_AT_ONCE = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Unstructured:
    """Single elements, compared within an output row (the group of Wanda, arXiv 2306.11695)."""

    kind: Literal["unstructured"] = "unstructured"

    @property
    def elements(self) -> int:
        """Elements that are kept or removed together."""
        return 1

    @property
    def fixed_ratio(self) -> float | None:
        """The share that the pattern removes by itself."""
        return None

    @property
    def label(self) -> str:
        """Name in reports."""
        return "unstructured"

    def check(self, linear: LinearSpec) -> None:
        """Every layer can be pruned like this."""


@dataclass(frozen=True, kw_only=True)
class SemiStructured:
    """Some of every few neighbouring columns of a row, such as 2 of 4.

    Attributes:
        keep: How many are kept.
        of: Of how many.
    """

    kind: Literal["semi_structured"] = "semi_structured"
    keep: int = 2
    of: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of:
            raise ValueError(f"keep must lie between 1 and of - 1, not {self.keep} of {self.of}")

    @property
    def elements(self) -> int:
        """Elements that are kept or removed together."""
        return 1

    @property
    def fixed_ratio(self) -> float | None:
        """The share that the pattern removes by itself."""
        return 1 - self.keep / self.of

    @property
    def label(self) -> str:
        """Name in reports."""
        return f"{self.keep}:{self.of}"

    def check(self, linear: LinearSpec) -> None:
        """Refuses a layer whose width is not a multiple of the pattern's.

        Raises:
            RecipeError: It does not divide.
        """
        if linear.in_features % self.of:
            raise RecipeError(
                f"{linear.name}: {self.keep} of {self.of} does not divide its "
                f"{linear.in_features} columns; give this layer a rule with ratio 0"
            )


@dataclass(frozen=True, kw_only=True)
class Blocked:
    """Rectangles of elements, compared within a band of rows; what the Neural Engine can skip.

    Attributes:
        rows: Rows of a block.
        columns: Columns of a block.
    """

    kind: Literal["blocked"] = "blocked"
    rows: int = 1
    columns: int = 16

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1:
            raise ValueError(f"a block must be at least 1 x 1, not {self.rows} x {self.columns}")

    @property
    def elements(self) -> int:
        """Elements that are kept or removed together."""
        return self.rows * self.columns

    @property
    def fixed_ratio(self) -> float | None:
        """The share that the pattern removes by itself."""
        return None

    @property
    def label(self) -> str:
        """Name in reports."""
        return f"blocks of {self.rows} x {self.columns}"

    def check(self, linear: LinearSpec) -> None:
        """Refuses a layer that is not a whole number of blocks.

        Raises:
            RecipeError: It does not divide.
        """
        if linear.out_features % self.rows or linear.in_features % self.columns:
            raise RecipeError(
                f"{linear.name}: {self.label} do not divide its {linear.out_features} x "
                f"{linear.in_features} weights; give this layer a rule with ratio 0"
            )


Pattern = Unstructured | SemiStructured | Blocked


def select(scores: Tensor, pattern: Pattern, kept: int) -> Tensor:
    """Keeps what scores highest; of equals, what stands further left.

    Rows (bands of rows, for blocks) keep equally many elements, to within one: importance is
    compared inside an output, whose scale says nothing about other outputs.

    Args:
        scores: [rows, columns], finite.
        pattern: What may be removed.
        kept: Elements that are kept in all, a multiple of `pattern.elements`.

    Returns:
        bool [rows, columns], true for exactly `kept` elements.

    Raises:
        ValueError: The count does not suit the pattern.
    """
    rows, columns = scores.shape
    if isinstance(pattern, SemiStructured):
        if kept != rows * columns * pattern.keep // pattern.of:
            raise ValueError(f"{pattern.label} of {rows} x {columns} does not keep {kept}")
        groups = scores.reshape(-1, pattern.of)
        counts = torch.full((len(groups),), pattern.keep)
        return keep_highest(groups, counts).reshape(rows, columns)
    if isinstance(pattern, Blocked):
        high, wide = pattern.rows, pattern.columns
        cells = scores.reshape(rows // high, high, columns // wide, wide).sum(dim=(1, 3))
        chosen = _select_in_rows(cells, kept // pattern.elements)
        return chosen.repeat_interleave(high, dim=0).repeat_interleave(wide, dim=1)
    return _select_in_rows(scores, kept)


def keep_highest(scores: Tensor, counts: Tensor) -> Tensor:
    """The highest scores of every row; of equals, what stands further left.

    Args:
        scores: [rows, columns], finite.
        counts: How many of each row, int64 [rows].

    Returns:
        bool [rows, columns].
    """
    # A few rows at a time, for the copies that sorting takes.
    step = max(1, _SORTED_AT_ONCE // scores.shape[1])
    parts = zip(scores.split(step), counts.split(step), strict=True)
    return torch.cat([_keep_highest(part, kept[:, None]) for part, kept in parts])


def _select_in_rows(scores: Tensor, kept: int) -> Tensor:
    rows, columns = scores.shape
    if not 0 <= kept <= rows * columns:
        raise ValueError(f"{kept} of {rows} x {columns} cannot be kept")
    borders = torch.arange(rows + 1) * kept // rows
    return keep_highest(scores, borders.diff())


def _keep_highest(scores: Tensor, kept: Tensor) -> Tensor:
    """Everything above the lowest score that a row keeps, and of its equals the first ones.

    Values are sorted without their places, at a third of the time: only a border is needed.
    """
    columns = scores.shape[1]
    ordered = torch.from_numpy(np.sort(scores.numpy(), axis=1))
    borders = ordered.gather(1, (columns - kept).clamp(max=columns - 1))
    chosen = scores >= borders
    tied = chosen.sum(dim=1) > kept[:, 0]
    if bool(tied.any()):
        above, equal = (scores > borders)[tied], (scores == borders)[tied]
        room = kept[tied] - above.sum(dim=1, keepdim=True)
        chosen[tied] = above | (equal & (equal.cumsum(dim=1) <= room))
    return chosen
