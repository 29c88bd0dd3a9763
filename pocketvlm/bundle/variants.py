"""The vision graphs of a bundle that has several: other sizes of pictures, other numbers of tokens.

They share their weights, and one decoder serves all of them: what enters it is rows, whichever
graph made them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pocketvlm.bundle.positions import PositionGrid

__all__ = ["MOST_VARIANTS", "VisionVariant"]

_MAX_POSITIONS = 2**24
_LONGEST_EDGE = 2**14
MOST_VARIANTS = 64
"""Vision graphs of one bundle, at most."""


@dataclass(frozen=True, kw_only=True)
class VisionVariant:
    """One vision graph.

    Attributes:
        name: What components call it, such as `k64_448x448`.
        height: Pixels of a tile from top to bottom.
        width: Pixels from left to right.
        visual_tokens: Embeddings that it returns for one tile, k.
        visual_tokens_full: Placeholders of a tile, N.
        position_grid: The N tokens, where positions have three axes.
    """

    name: str
    height: int
    width: int
    visual_tokens: int
    visual_tokens_full: int
    position_grid: PositionGrid | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.visual_tokens <= self.visual_tokens_full <= _MAX_POSITIONS:
            raise ValueError(
                f"visual_tokens are {self.visual_tokens} of {self.visual_tokens_full}; both must "
                "be at least 1, and the first no more than the second"
            )
        if not (1 <= self.height <= _LONGEST_EDGE and 1 <= self.width <= _LONGEST_EDGE):
            raise ValueError(f"height and width must be 1 to {_LONGEST_EDGE:,} pixels")
        if self.position_grid is not None and self.position_grid.tokens != self.visual_tokens_full:
            raise ValueError("position_grid must have visual_tokens_full tokens")
