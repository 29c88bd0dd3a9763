"""The form in which a visual-token reduction travels from the method to every exporter.

A method (a file of `compress/tokens/`) subclasses `TokenReducer`; the checkpoint carries the
instance; the torch forward pass calls it and every exporter traces it. So an exporter never knows
which method it exports, and what runs on the phone is the very module that was evaluated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

__all__ = ["POSITION_POLICIES", "BlockRows", "PositionPolicy", "ReducerInputs", "TokenReducer"]

PositionPolicy = Literal["original", "consecutive"]
POSITION_POLICIES: tuple[PositionPolicy, ...] = ("original", "consecutive")


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockRows:
    """What one block of the tower compares its tokens by.

    Attributes:
        queries: Scaled by 1/sqrt(d), [B, H, T, d]; T counts the patches and, where the tower has
            one, the [CLS] token at index 0.
        keys: [B, H, T, d].
    """

    queries: Tensor
    keys: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class ReducerInputs:
    """What a reducer may look at.

    Attributes:
        features: What would enter the projector, [B, N, C], after merging patches.
        queries: Queries of the tower's feature block, scaled by 1/sqrt(d), [B, H, T, d]; T counts
            the patches and, where the tower has one, the [CLS] token at index 0.
        keys: Keys of the same block, [B, H, T, d].
        has_cls: Whether token 0 of `queries` and `keys` is [CLS].
        merge_factor: Side of the square of patches that make up one feature.
        patch_rows: Patches of an image from top to bottom.
        earlier: Queries and keys of the blocks that the reducer names in `earlier_blocks`.
    """

    features: Tensor
    queries: Tensor
    keys: Tensor
    has_cls: bool
    merge_factor: int
    patch_rows: int
    earlier: tuple[BlockRows, ...] = ()


class TokenReducer(nn.Module, ABC):
    """Removes visual tokens physically: N features in, exactly `keep` features out.

    Only operators that every target can run may appear in `forward` (no sort, no boolean
    indexing, no scatter), and its output shapes are static.

    Attributes:
        keep: Features that are returned, k.
        positions: Whether kept tokens keep the position ids they had among all N tokens
            (`original`), or are recounted (`consecutive`).
        earlier_blocks: Blocks of the tower before the feature block whose queries and keys it
            reads, ascending.
    """

    def __init__(
        self, *, keep: int, positions: PositionPolicy, earlier_blocks: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.keep = keep
        self.positions: PositionPolicy = positions
        self.earlier_blocks = earlier_blocks

    @abstractmethod
    def forward(self, inputs: ReducerInputs) -> tuple[Tensor, Tensor]:
        """Returns the kept features [B, k, C] and their indices [B, k] (int64, ascending)."""
