"""Decoders: embeddings to logits, with the positions and the reach of their attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pocketvlm.models.blocks import AttentionSpec, BlockSpec, DecoderBlock, ShortConvSpec

__all__ = ["DecoderSpec", "RopeSpec", "SlidingSpec"]

_LONGEST_CONTEXT = 4096


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary positions of a decoder (RoFormer, arXiv 2104.09864).

    Attributes:
        theta: The base of the frequencies.
        width: Channels of a head that are rotated.
        sections: Pairs of channels that turn by the position in time, by that in height and by that
            in width (M-RoPE, arXiv 2409.12191, section 2.1); empty where positions have one axis.
        is_interleaved: Whether sections alternate pair by pair, and time takes what the other two
            leave, or lie one after another.
        factor: What positions are divided by (2306.15595).
    """

    theta: float
    width: int
    sections: tuple[int, ...] = ()
    is_interleaved: bool = False
    factor: float = 1.0

    @property
    def axes(self) -> int:
        """Numbers that a position consists of."""
        return max(1, len(self.sections))

    @property
    def pair_axes(self) -> tuple[int, ...]:
        """Which of them turns each pair of channels."""
        if not self.sections:
            return (0,) * (self.width // 2)
        if not self.is_interleaved:
            return tuple(axis for axis, pairs in enumerate(self.sections) for _ in range(pairs))
        axes = [0] * (self.width // 2)
        for axis, pairs in enumerate(self.sections):
            if axis > 0:
                last = min(len(axes), self.axes * pairs)
                axes[axis : last : self.axes] = [axis] * len(range(axis, last, self.axes))
        return tuple(axes)


@dataclass(frozen=True, kw_only=True)
class SlidingSpec:
    """Attention to the near past alone (Longformer, arXiv 2004.05150).

    Attributes:
        window: Rows that a row sees, itself included.
        rope: Positions of the layers that have it.
    """

    window: int
    rope: RopeSpec


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A pre-norm decoder with rotary positions and grouped queries.

    Attributes:
        prefix: Module name of the text model.
        embedding: Module name of the token embedding.
        stack: Module name of the list of blocks.
        blocks: All of them.
        norm: Module name of the norm after the last block.
        head: Module name of the language-model head.
        tied_head: Whether the head shares the embedding's weight.
        has_qkv_bias: Whether queries, keys and values have biases.
        has_output_bias: Whether the attention's last linear has one.
        has_mlp_bias: Whether the FFN's linears have.
        addable_biases: Sublayers whose linears its stock class may be given biases, all of them.
        sliding: How blocks attend that do not see the whole past; `None` where all see it.
        mutual_rows: Rows that see each other, the later ones too: those of a picture's tile, or
            the whole prompt; `None` where every row sees the past alone.
        embed_scale: What rows of the token embedding are multiplied by.
        score_softcap: Bound c of attention scores s, as c tanh(s / c); `None` for none.
        logit_softcap: Likewise of the logits.
    """

    prefix: str
    embedding: str
    stack: str
    blocks: tuple[DecoderBlock, ...]
    norm: str
    head: str
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope: RopeSpec
    norm_eps: float
    activation: str
    tied_head: bool
    has_qkv_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    addable_biases: tuple[Literal["attention", "mlp"], ...] = ()
    sliding: SlidingSpec | None = None
    mutual_rows: Literal["tile", "prompt"] | None = None
    embed_scale: float = 1.0
    score_softcap: float | None = None
    logit_softcap: float | None = None

    @property
    def depth(self) -> int:
        """Blocks."""
        return len(self.blocks)

    @property
    def attention_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that have attention, and with it a cache of keys and values."""
        return tuple(i for i, block in enumerate(self.blocks) if isinstance(block, BlockSpec))

    def attention(self, block: int) -> AttentionSpec:
        """The attention of a block that has it.

        Raises:
            ValueError: It has none.
        """
        found = self.blocks[block]
        if not isinstance(found, BlockSpec):
            raise ValueError(f"{found.module} has no attention")  # noqa: TRY004  (a block's kind)
        return found.attention

    @property
    def convolutions(self) -> dict[int, ShortConvSpec]:
        """Short convolutions by the indices of their blocks."""
        return {
            i: block.conv for i, block in enumerate(self.blocks) if not isinstance(block, BlockSpec)
        }

    @property
    def context_length(self) -> int:
        """Positions that prompts and answers may use: those of the model, within a phone's reach.

        It is the bundle's `max_positions`, and the limit of evaluation.
        """
        return min(self.max_positions, _LONGEST_CONTEXT)

    def sliding_of(self, block: int) -> SlidingSpec | None:
        """How a block attends that does not see the whole past; `None` for one that does."""
        found = self.blocks[block]
        is_sliding = isinstance(found, BlockSpec) and found.attention.is_sliding
        return self.sliding if is_sliding else None

    def rope_of(self, block: int) -> RopeSpec:
        """Rotary positions of a block."""
        sliding = self.sliding_of(block)
        return self.rope if sliding is None else sliding.rope

    @property
    def has_masks(self) -> bool:
        """Whether some row sees others than all of the past."""
        return self.mutual_rows is not None or self.sliding is not None
