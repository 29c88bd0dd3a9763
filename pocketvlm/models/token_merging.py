"""Where a vision tower's tokens are merged, as plain data: after which block, how, how many remain.

Tokens are merged between attention and the feed-forward network of a block, as ToMe does. What
leaves the tower is restored: each patch gets the feature of the token that it became part of, so
that the projector sees as many visual tokens as before, where they were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "ImportantTokens",
    "NeighbourTokens",
    "SimilarTokens",
    "TokenMerge",
    "check_semantic_weight",
    "merge_fault",
]


def check_semantic_weight(weight: float) -> None:
    """Checks how much attention speaks against merging a token.

    Raises:
        ValueError: It is not a number of at least 0.
    """
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"semantic_weight is {weight}; allowed are numbers of at least 0")


@dataclass(frozen=True, kw_only=True)
class SimilarTokens:
    """Pairs of tokens that are alike become one (`graph.token_merging.match_similar`).

    Attributes:
        block: The block.
        patches: Tokens that remain beside [CLS]; at least half of those before.
        semantic_weight: How much attention speaks against merging a token, in units of cosine for
            a token of average attention.
    """

    kind: Literal["similar"] = "similar"
    block: int
    patches: int
    semantic_weight: float = 0.0

    def __post_init__(self) -> None:
        check_semantic_weight(self.semantic_weight)

    @property
    def reads_attention(self) -> bool:
        """Whether attention counts."""
        return self.semantic_weight > 0


@dataclass(frozen=True, kw_only=True)
class NeighbourTokens:
    """Each rectangle of neighbouring patches becomes one token.

    Attributes:
        block: The block.
        patches: Tokens that remain beside [CLS].
        rows: Patches of a rectangle from top to bottom.
        columns: Patches from left to right.
    """

    kind: Literal["neighbours"] = "neighbours"
    block: int
    patches: int
    rows: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class ImportantTokens:
    """The tokens of the highest score remain, and all others become one.

    Attributes:
        block: The block.
        patches: Tokens that remain beside [CLS], that of all others included.
        score: `attention` that a token gets, of [CLS] where there is one, else of all; or how
            `distinct` it is from the mean of the picture.
    """

    kind: Literal["important"] = "important"
    block: int
    patches: int
    score: Literal["attention", "distinct"]

    @property
    def reads_attention(self) -> bool:
        """Whether attention counts."""
        return self.score == "attention"


TokenMerge = SimilarTokens | NeighbourTokens | ImportantTokens
"""One place in a tower where tokens are merged."""


def merge_fault(
    merge: TokenMerge, rows: int, columns: int, before: int, *, is_first: bool
) -> str | None:
    """Why tokens cannot be merged so, or `None`.

    Args:
        merge: How.
        rows: Patches of a picture from top to bottom.
        columns: Patches from left to right.
        before: Patches and tokens that became of them, before it.
        is_first: Whether each patch is a token still.
    """
    if not 1 <= merge.patches < before:
        return f"{merge.patches} of {before} patches are to remain; allowed are 1 to {before - 1}"
    if isinstance(merge, SimilarTokens) and merge.patches < before // 2:
        return (
            f"{merge.patches} of {before} patches are to remain; pairs that are alike leave at "
            f"least {before // 2} in one block"
        )
    if isinstance(merge, NeighbourTokens):
        if not is_first:
            return "patches that were merged before have no neighbours"
        if rows % merge.rows or columns % merge.columns:
            return (
                f"{rows} x {columns} patches are not whole rectangles of {merge.rows} x "
                f"{merge.columns}"
            )
        if merge.patches != rows * columns // (merge.rows * merge.columns):
            return f"{merge.patches} patches are not the number of its rectangles"
    return None
