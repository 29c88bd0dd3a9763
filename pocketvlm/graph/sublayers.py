"""Sublayers of the graphs: what stands between the norm of a hidden state and the sum with it."""

from __future__ import annotations

from typing import TypeVar

from pocketvlm.graph.operators import GraphOps
from pocketvlm.models.spec import AttentionSpec, FfnSpec

__all__ = ["decoder_attention", "feed_forward", "tower_attention"]

ValueT = TypeVar("ValueT")


def tower_attention(
    ops: GraphOps[ValueT], attention: AttentionSpec, normed: ValueT
) -> tuple[ValueT, ValueT, ValueT]:
    """Attention of patches to each other.

    Returns:
        What is added to the hidden state, and the queries and keys, which may score tokens: before
        they are turned, since equal content at different places should look equal.
    """
    names = attention.inputs
    queries, keys, values = ops.split(ops.linear(normed, *names), *names)
    attended = ops.linear(ops.attention(queries, keys, values, attention.window), attention.o)
    return attended, queries, keys


def decoder_attention(
    ops: GraphOps[ValueT],
    attention: AttentionSpec,
    block: int,
    normed: ValueT,
) -> ValueT:
    """Causal attention of a decoder block, without the linear that ends it.

    Rows may end between the two, whose keys and values are read and which nothing reads after.

    Args:
        ops: The operators.
        attention: The sublayer.
        block: Index of its block, whose cache is extended.
        normed: What it reads.
    """
    names = attention.inputs
    return ops.cached_attention(ops.linear(normed, *names), block, *names)


def feed_forward(ops: GraphOps[ValueT], ffn: FfnSpec, normed: ValueT, activation: str) -> ValueT:
    """A feed-forward network, gated or not."""
    joined = ops.linear(normed, *ffn.inputs)
    if ffn.gate is None:
        inner = ops.activation(joined, activation)
    else:
        inner = ops.gated(joined, ffn.gate, ffn.up, activation)
    return ops.linear(inner, ffn.down)
