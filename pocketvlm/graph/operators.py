"""Operators of the phone graphs: what a target supplies, over its own kind of value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from pocketvlm.models.token_merging import TokenMerge

__all__ = ["GraphOps"]

ValueT = TypeVar("ValueT")


class GraphOps(Protocol[ValueT]):
    """Operators of one target, over its own values; layers are named as in the checkpoint.

    Values are float32 and have a batch of one: [1, tokens, channels].
    """

    @property
    def earlier_blocks(self) -> tuple[int, ...]:
        """Blocks of the tower before the feature block that the token reduction reads."""
        ...

    def embed_patches(self, pixels: ValueT) -> ValueT:
        """Patches with their positions, after [CLS] where there is one: [1, tokens, hidden]."""
        ...

    def embed_tokens(self, token_ids: ValueT) -> ValueT:
        """Rows of the token embedding times `DecoderSpec.embed_scale`, [1, length, width]."""
        ...

    def linear(self, inputs: ValueT, *names: str) -> ValueT:
        """Linear layers that share their input, outputs joined along the channels."""
        ...

    def split(self, joined: ValueT, *names: str) -> tuple[ValueT, ...]:
        """Takes apart what `linear` joined."""
        ...

    def norm(self, inputs: ValueT, name: str) -> ValueT:
        """A LayerNorm or RMSNorm."""
        ...

    def add_norm(self, inputs: ValueT, residual: ValueT, name: str) -> tuple[ValueT, ValueT]:
        """The norm of a sum, and the sum."""
        ...

    def add(self, left: ValueT, right: ValueT) -> ValueT:
        """A sum."""
        ...

    def activation(self, inputs: ValueT, kind: str) -> ValueT:
        """An activation by the name that Hugging Face gives it."""
        ...

    def gated(self, joined: ValueT, gate: str, up: str, kind: str) -> ValueT:
        """`activation(gate) * up` of joined outputs."""
        ...

    def norm_heads(self, joined: ValueT, name: str) -> ValueT:
        """Each head of the tower's queries or keys after a norm, joined again."""
        ...

    def attention(
        self,
        queries: ValueT,
        keys: ValueT,
        values: ValueT,
        window: int | None = None,
        sizes: ValueT | None = None,
    ) -> ValueT:
        """The tower's attention, heads joined again, of all tokens or of those of a window.

        Queries and keys are turned by the positions of their patches, where the tower does that.
        A key counts as often as its size says, [1, tokens, 1]: proportional attention (ToMe, arXiv
        2210.09461, eq. 1).
        """
        ...

    def merge_tokens(
        self,
        merge: TokenMerge,
        hidden: ValueT,
        queries: ValueT,
        keys: ValueT,
        before: tuple[ValueT, ValueT] | None,
    ) -> tuple[ValueT, ValueT, ValueT]:
        """Fewer tokens of the tower, as `graph.token_merging`.

        Args:
            merge: Which rule, and how many remain.
            hidden: What attention has left.
            queries: Queries of that attention, not scaled yet.
            keys: Its keys.
            before: Sizes and places of the tokens, as this returns them; `None` at first.

        Returns:
            Hidden states, patches that each token stands for, [1, tokens, 1], and which of them
            stands for each token that the tower began with, [1, all].
        """
        ...

    def cached_attention(self, joined: ValueT, block: int, *names: str) -> ValueT:
        """The decoder's attention with rotary positions, extending the cache of a block.

        Heads of queries and keys pass the norms of the block's attention first, where it has any.
        """
        ...

    def short_conv(self, joined: ValueT, block: int, *names: str) -> ValueT:
        """C * conv(B * x) of joined B, C and x, extending the state of a decoder block."""
        ...

    def head(self, normed: ValueT) -> ValueT:
        """Logits, bounded by `DecoderSpec.logit_softcap`."""
        ...

    def join_channels(self, *parts: ValueT) -> ValueT:
        """Values of the same tokens, channels after channels."""
        ...

    def drop_first(self, inputs: ValueT) -> ValueT:
        """All tokens but the first."""
        ...

    def last(self, inputs: ValueT) -> ValueT:
        """The last token alone, [1, 1, channels]."""
        ...

    def merge_patches(self, features: ValueT, factor: int) -> ValueT:
        """Pixel shuffle, as `tensor_ops.merge_patches`."""
        ...

    def average_patches(self, features: ValueT, factor: int) -> ValueT:
        """The mean of each square of patches, tokens in raster order."""
        ...

    def split_channels(self, joined: ValueT, width: int) -> tuple[ValueT, ...]:
        """What `join_channels` joined, of values of one width."""
        ...

    def widen(self, inputs: ValueT, width: int) -> ValueT:
        """The same with zeros in further channels, up to a width."""
        ...

    def take(self, features: ValueT, indices: ValueT) -> ValueT:
        """Tokens by their indices, [1, k]."""
        ...

    def reduce(
        self,
        features: ValueT,
        queries: ValueT,
        keys: ValueT,
        earlier: Sequence[tuple[ValueT, ValueT]] = (),
    ) -> tuple[ValueT, ValueT]:
        """The checkpoint's token reduction: kept features and their indices.

        Queries and keys are those of the feature block, [1, tokens, hidden], not scaled yet, and
        those of `earlier_blocks`, likewise.
        """
        ...
