"""Sublayers of the graphs: what stands between the norm of a hidden state and the sum with it."""

from __future__ import annotations

from typing import TypeVar

from pocketvlm.graph.operators import GraphOps
from pocketvlm.models.blocks import AttentionSpec, FfnSpec, ShortConvSpec

__all__ = ["decoder_mixer", "feed_forward", "mixer_output", "tower_attention", "tower_heads"]

ValueT = TypeVar("ValueT")


def tower_attention(
    ops: GraphOps[ValueT],
    attention: AttentionSpec,
    normed: ValueT,
    sizes: ValueT | None = None,
) -> tuple[ValueT, ValueT, ValueT]:
    """Attention of patches to each other.

    Args:
        ops: The operators.
        attention: The sublayer.
        normed: What it reads.
        sizes: Patches that each token stands for; `None` where all stand for as many.

    Returns:
        What is added to the hidden state, and the queries and keys, which may score tokens: before
        they are turned, since equal content at different places should look equal.
    """
    queries, keys, values = tower_heads(ops, attention, normed)
    attended = ops.attention(queries, keys, values, attention.window, sizes)
    return ops.linear(attended, attention.o), queries, keys


def tower_heads(
    ops: GraphOps[ValueT], attention: AttentionSpec, normed: ValueT
) -> tuple[ValueT, ValueT, ValueT]:
    """Queries, keys and values of patches: normed head by head where the tower does that."""
    names = attention.inputs
    queries, keys, values = ops.split(ops.linear(normed, *names), *names)
    if attention.q_norm is not None:
        queries = ops.norm_heads(queries, attention.q_norm)
    if attention.k_norm is not None:
        keys = ops.norm_heads(keys, attention.k_norm)
    return queries, keys, values


def decoder_mixer(
    ops: GraphOps[ValueT],
    mixer: AttentionSpec | ShortConvSpec,
    block: int,
    joined: ValueT,
) -> ValueT:
    """Attention of a decoder block or its short convolution, without the linears on both sides.

    Rows may be dropped between the three: those that attention needs no more, and those whose keys
    and values it reads and which nothing reads after.

    Args:
        ops: The operators.
        mixer: The sublayer.
        block: Index of its block, whose cache or state is extended.
        joined: What its first linears gave.
    """
    if isinstance(mixer, ShortConvSpec):
        return ops.short_conv(joined, block, *mixer.inputs)
    return ops.cached_attention(joined, block, *mixer.inputs)


def mixer_output(
    ops: GraphOps[ValueT], mixer: AttentionSpec | ShortConvSpec, mixed: ValueT
) -> ValueT:
    """What the sublayer adds to the hidden state, from what `decoder_mixer` gave."""
    output = ops.linear(mixed, mixer.output)
    if isinstance(mixer, ShortConvSpec) or mixer.post_norm is None:
        return output
    return ops.norm(output, mixer.post_norm)


def feed_forward(ops: GraphOps[ValueT], ffn: FfnSpec, normed: ValueT, activation: str) -> ValueT:
    """A feed-forward network, gated or not."""
    joined = ops.linear(normed, *ffn.inputs)
    if ffn.gate is None:
        inner = ops.activation(joined, activation)
    else:
        inner = ops.gated(joined, ffn.gate, ffn.up, activation)
    inner = ops.linear(inner, ffn.down)
    return inner if ffn.post_norm is None else ops.norm(inner, ffn.post_norm)
