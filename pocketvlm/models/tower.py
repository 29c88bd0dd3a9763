"""Vision towers: pixels to the features of patches."""

from __future__ import annotations

from dataclasses import dataclass

from pocketvlm.models.blocks import BlockSpec
from pocketvlm.models.token_merging import NeighbourTokens, TokenMerge

__all__ = ["TowerSpec"]


@dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """A pre-norm vision transformer.

    Attributes:
        prefix: Module name of the tower.
        embeddings: Module name of what turns pixels into tokens.
        patch_embedding: Module name of the convolution in it.
        class_embedding: Name of the parameter in it that is the [CLS] token.
        position_embedding: Module name of its table of positions, where there is one.
        pre_norm: Module name of the norm before the first block, where there is one.
        post_norm: Module name of the norm after the last block, where there is one.
        stack: Module name of the list of blocks.
        blocks: All of them, also those that are never run.
        feature_block: Index of the last block that is run; its output feeds the projector.
        earlier_features: Blocks before it whose outputs feed the projector as well: they stand
            before its own, channels after channels.
        height: Pixels of a picture from top to bottom.
        width: Pixels of a picture from left to right.
        has_post_norm: Whether the features pass `post_norm`.
        activation: Hugging Face's name of the FFN's activation.
        has_qkv_bias: Whether queries, keys and values have biases; every other linear has one.
        has_norm_bias: Whether norms are LayerNorms or, without a bias, RMSNorms.
        table_side: Positions along one side of the square that the table holds, which is resampled
            to the picture; `None` where it has one for each token.
        aligns_corners: Whether that puts the table's corners into the picture's, or takes its
            positions for centres of cells.
        rope_theta: Base of the frequencies by which queries and keys turn: one half of the pairs of
            channels by a patch's row, the other by its column; `None` where they do not.
        merges: Where tokens are merged, by ascending blocks of which none is named twice.
    """

    prefix: str
    embeddings: str
    patch_embedding: str
    class_embedding: str | None
    position_embedding: str | None
    pre_norm: str | None
    post_norm: str | None
    stack: str
    blocks: tuple[BlockSpec, ...]
    feature_block: int
    hidden_size: int
    ffn_size: int
    heads: int
    height: int
    width: int
    patch_size: int
    channels: int
    has_patch_bias: bool
    has_post_norm: bool
    activation: str
    norm_eps: float
    has_qkv_bias: bool = True
    has_norm_bias: bool = True
    table_side: int | None = None
    aligns_corners: bool = True
    rope_theta: float | None = None
    earlier_features: tuple[int, ...] = ()
    merges: tuple[TokenMerge, ...] = ()

    @property
    def feature_size(self) -> int:
        """Channels of the features of one patch."""
        return self.hidden_size * (1 + len(self.earlier_features))

    @property
    def depth(self) -> int:
        """Blocks, also those that are never run."""
        return len(self.blocks)

    @property
    def feature_norm(self) -> str | None:
        """Module name of the norm that features pass, where they pass one."""
        return self.post_norm if self.has_post_norm else None

    @property
    def takes_any_size(self) -> bool:
        """Whether the model takes pictures of any size, so that this one was chosen for it."""
        return self.rope_theta is not None

    @property
    def has_cls(self) -> bool:
        """Whether token 0 is a [CLS] token, which is dropped before the projector."""
        return self.class_embedding is not None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.heads

    @property
    def rows(self) -> int:
        """Patches from top to bottom."""
        return self.height // self.patch_size

    @property
    def columns(self) -> int:
        """Patches from left to right."""
        return self.width // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """Tokens that one image is inside the tower: its patches, and [CLS] where there is one."""
        return self.patches + int(self.has_cls)

    def merge_in(self, block: int) -> TokenMerge | None:
        """How tokens are merged after the attention of a block; `None` where they are not."""
        return next((merge for merge in self.merges if merge.block == block), None)

    def tokens_entering(self, block: int) -> int:
        """Tokens that one image is before a block."""
        merged = [merge.patches for merge in self.merges if merge.block < block]
        return min((self.patches, *merged)) + int(self.has_cls)

    def tokens_after(self, merge: TokenMerge) -> int:
        """Tokens that one image is after they are merged."""
        return merge.patches + int(self.has_cls)

    def weighs_tokens(self, block: int) -> bool:
        """Whether tokens that enter a block stand for different numbers of patches."""
        before = [merge for merge in self.merges if merge.block < block]
        return bool(before) and (
            self.has_cls or not all(isinstance(merge, NeighbourTokens) for merge in before)
        )
