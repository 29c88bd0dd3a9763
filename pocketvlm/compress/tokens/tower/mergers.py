"""Rules by which tokens of the vision tower are merged, as a recipe names them.

What each does to tensors is in `graph.token_merging`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from pocketvlm.errors import RecipeError
from pocketvlm.models.token_merging import (
    ImportantTokens,
    NeighbourTokens,
    SimilarTokens,
    TokenMerge,
    check_semantic_weight,
)
from pocketvlm.models.tower import TowerSpec

__all__ = ["AnyMerger", "MergeImportant", "MergeNeighbours", "MergeSimilar", "Merger"]


class Merger(ABC):
    """A rule: a frozen dataclass that is its own configuration."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The tag that names it in a recipe."""

    def nearest_count(self, tower: TowerSpec, count: int) -> int:
        """The number of patches closest to `count` that the rule can leave."""
        return count

    @abstractmethod
    def merge(self, tower: TowerSpec, block: int, patches: int) -> TokenMerge:
        """The merge after the attention of a block that leaves `patches`.

        Raises:
            RecipeError: The rule cannot leave as many.
        """


@dataclass(frozen=True, kw_only=True)
class MergeSimilar(Merger):
    """Averages the tokens whose keys are most alike (ToMe), sparing those that draw attention.

    Attributes:
        semantic_weight: How much attention speaks against merging a token, in units of cosine for
            a token of average attention (Turbo); 0 looks at likeness alone.
    """

    kind: Literal["similar"] = "similar"
    semantic_weight: float = 0.0

    def __post_init__(self) -> None:
        check_semantic_weight(self.semantic_weight)

    def merge(self, tower: TowerSpec, block: int, patches: int) -> TokenMerge:
        """The merge of one block."""
        return SimilarTokens(block=block, patches=patches, semantic_weight=self.semantic_weight)


@dataclass(frozen=True, kw_only=True)
class MergeNeighbours(Merger):
    """Averages rectangles of neighbouring patches: 1 x 2, 2 x 2, 2 x 4 or 4 x 4.

    A share is rounded to what one of these leaves.
    """

    kind: Literal["neighbours"] = "neighbours"

    def nearest_count(self, tower: TowerSpec, count: int) -> int:
        """The number of rectangles closest to `count`, by ratio."""
        found = [tower.patches // (rows * columns) for rows, columns in _rectangles(tower)]
        return min(found, key=lambda each: abs(math.log(each / count)), default=count)

    def merge(self, tower: TowerSpec, block: int, patches: int) -> TokenMerge:
        """The merge of one block.

        Raises:
            RecipeError: No rectangle leaves as many patches.
        """
        shapes = {tower.patches // (high * wide): (high, wide) for high, wide in _rectangles(tower)}
        if shapes and patches not in shapes:
            raise RecipeError(
                f"merge_tokens: block {block}: {patches} of {tower.patches} patches are to remain; "
                f"neighbours leaves {' or '.join(map(str, shapes))}, all in one block"
            )
        rows, columns = shapes.get(patches, _RECTANGLES[0])
        return NeighbourTokens(block=block, patches=patches, rows=rows, columns=columns)


@dataclass(frozen=True, kw_only=True)
class MergeImportant(Merger):
    """Keeps the tokens of highest score, and averages all others into one (EViT).

    Attributes:
        score: `attention` that a token gets, from [CLS] where there is one, else from all; or how
            `distinct` it is from the mean of the picture.
    """

    kind: Literal["important"] = "important"
    score: Literal["attention", "distinct"] = "distinct"

    def merge(self, tower: TowerSpec, block: int, patches: int) -> TokenMerge:
        """The merge of one block."""
        return ImportantTokens(block=block, patches=patches, score=self.score)


AnyMerger = MergeSimilar | MergeNeighbours | MergeImportant
"""Everything that a recipe may name as `merger`."""

_RECTANGLES = ((1, 2), (2, 2), (2, 4), (4, 4))


def _rectangles(tower: TowerSpec) -> list[tuple[int, int]]:
    """Rows and columns of the rectangles that a picture of this tower is made of."""
    return [
        (rows, columns)
        for rows, columns in _RECTANGLES
        if tower.rows % rows == 0 and tower.columns % columns == 0
    ]
