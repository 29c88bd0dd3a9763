"""Transformer blocks by the names of their modules: what graphs, calibration and pruning ask."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "AttentionSpec",
    "BlockSpec",
    "ConvBlockSpec",
    "DecoderBlock",
    "FfnSpec",
    "ShortConvSpec",
]


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The attention of a block, by the names of its modules: x + attention(norm(x)).

    Attributes:
        module: The whole.
        norm: What is applied to the hidden state first.
        q: The linear that makes queries.
        k: Keys.
        v: Values.
        o: What projects the heads back to the hidden state.
        q_norm: The RMSNorm of each head of the queries, before they are rotated; `None` for none.
        k_norm: Likewise of the keys.
        window: Side, in patches, of the squares within which a tower's tokens attend to each other;
            `None` where they attend to all.
        post_norm: What is applied to what the sublayer returns, before the sum; `None` for nothing.
        is_sliding: Whether a row sees no further back than `DecoderSpec.sliding` says.
    """

    module: str
    norm: str
    q: str
    k: str
    v: str
    o: str
    q_norm: str | None = None
    k_norm: str | None = None
    window: int | None = None
    post_norm: str | None = None
    is_sliding: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Linears that read the norm's output."""
        return (self.q, self.k, self.v)

    @property
    def output(self) -> str:
        """The linear that ends the sublayer."""
        return self.o


@dataclass(frozen=True, kw_only=True)
class FfnSpec:
    """The feed-forward network of a block, by the names of its modules: x + ffn(norm(x)).

    Attributes:
        module: The whole.
        norm: What is applied to the hidden state first.
        gate: The linear whose activation multiplies `up`, or `None` where `up` itself is activated.
        up: The linear that widens.
        down: The linear that narrows again.
        post_norm: What is applied to what the sublayer returns, before the sum; `None` for nothing.
    """

    module: str
    norm: str
    gate: str | None
    up: str
    down: str
    post_norm: str | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Linears that read the norm's output."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def output(self) -> str:
        """The linear that ends the sublayer."""
        return self.down


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """One transformer block, by the names of its modules.

    Attributes:
        module: The block.
        attention: Its first sublayer.
        ffn: Its second.
    """

    module: str
    attention: AttentionSpec
    ffn: FfnSpec

    @property
    def mixer(self) -> AttentionSpec:
        """The sublayer in which rows see each other."""
        return self.attention


@dataclass(frozen=True, kw_only=True)
class ShortConvSpec:
    """A gated short convolution (LFM2, arXiv 2511.23404), by the names of its modules.

    It makes C * conv(B * x), each channel convolved along the rows. What it keeps of the past is a
    state, the last `taps - 1` rows of B * x.

    Attributes:
        module: The whole.
        norm: What is applied to the hidden state first.
        b: The linear that makes the gate before the convolution.
        c: The gate after it.
        x: What is convolved.
        kernel: The convolution, weight [width, 1, taps].
        taps: Rows that it sees: the current one and those before it.
        o: The linear that ends the sublayer.
        has_bias: Whether linears and convolution have biases.
    """

    module: str
    norm: str
    b: str
    c: str
    x: str
    kernel: str
    taps: int
    o: str
    has_bias: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        """Linears that read the norm's output."""
        return (self.b, self.c, self.x)

    @property
    def output(self) -> str:
        """The linear that ends the sublayer."""
        return self.o


@dataclass(frozen=True, kw_only=True)
class ConvBlockSpec:
    """A decoder block that has a short convolution instead of attention.

    Attributes:
        module: The block.
        conv: Its first sublayer.
        ffn: Its second.
    """

    module: str
    conv: ShortConvSpec
    ffn: FfnSpec

    @property
    def mixer(self) -> ShortConvSpec:
        """The sublayer in which rows see each other."""
        return self.conv


DecoderBlock = BlockSpec | ConvBlockSpec
"""A block of a decoder; those of a tower have attention."""
