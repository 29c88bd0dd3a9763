"""The three phone graphs, written once over operators that each target supplies.

What a graph is (which hidden state becomes a feature, where tokens are dropped, what is computed
for the last position alone) is said here and in `sublayers`, and nowhere else; how it is computed
is the target's: a target implements `GraphOps` for its own kind of value. Torch's definition of
truth, `pocketvlm.reference_graph`, runs the same sublayers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from pocketvlm.graph.operators import GraphOps
from pocketvlm.graph.sublayers import decoder_mixer, feed_forward, mixer_output, tower_attention
from pocketvlm.models.decoder import DecoderSpec
from pocketvlm.models.projector import ProjectorSpec, TapSpec, run_steps
from pocketvlm.models.spec import ModelSpec

__all__ = [
    "RowDrops",
    "build_decoder",
    "build_embedding",
    "build_prefill",
    "build_vision",
    "merged_features",
    "tap_rows",
]

ValueT = TypeVar("ValueT")


class RowDrops(Protocol[ValueT]):
    """Where rows leave a decoder, in the values of one target."""

    def before_attention(self, block: int, joined: ValueT, hidden: ValueT) -> tuple[ValueT, ValueT]:
        """What is left of queries, keys and values of a block, and of the hidden state."""
        ...

    def after_attention(
        self, block: int, joined: ValueT, mixed: ValueT, hidden: ValueT
    ) -> tuple[ValueT, ValueT]:
        """What is left of what attention gave, and of the hidden state.

        Args:
            block: Index of the block.
            joined: Queries, keys and values of the attention.
            mixed: What it gave.
            hidden: The hidden state before it.
        """
        ...


def build_vision(ops: GraphOps[ValueT], spec: ModelSpec, pixels: ValueT) -> tuple[ValueT, ValueT]:
    """Pixels to the embeddings and indices of the visual tokens that are kept."""
    tower = spec.tower
    blocks = tower.blocks[: tower.feature_block + 1]
    hidden = ops.embed_patches(pixels)
    if tower.pre_norm is not None:
        hidden = ops.norm(hidden, tower.pre_norm)
    normed = ops.norm(hidden, blocks[0].attention.norm)
    earlier: list[ValueT] = []
    heads: list[tuple[ValueT, ValueT]] = []
    merged: tuple[ValueT, ValueT] | None = None
    tapped: dict[int, ValueT] = {}
    for index, (block, following) in enumerate(zip(blocks, (*blocks[1:], None), strict=True)):
        sizes = merged[0] if merged is not None and tower.weighs_tokens(index) else None
        attended, queries, keys = tower_attention(ops, block.attention, normed, sizes)
        if index in (*ops.earlier_blocks, tower.feature_block):
            heads.append((_restored(ops, queries, merged), _restored(ops, keys, merged)))
        merge = tower.merge_in(index)
        if merge is None:
            normed, hidden = ops.add_norm(attended, hidden, block.ffn.norm)
        else:
            hidden = ops.add(attended, hidden)
            hidden, sizes, places = ops.merge_tokens(merge, hidden, queries, keys, merged)
            merged = (sizes, places)
            normed = ops.norm(hidden, block.ffn.norm)
        inner = feed_forward(ops, block.ffn, normed, tower.activation)
        if following is not None:
            normed, hidden = ops.add_norm(inner, hidden, following.attention.norm)
            if index in tower.earlier_features:
                earlier.append(hidden)
            tapped[index] = hidden
    if tower.feature_norm is not None:
        features, _ = ops.add_norm(inner, hidden, tower.feature_norm)
    else:
        features = ops.add(inner, hidden)
    features = _restored(ops, features, merged)
    if earlier:
        features = ops.join_channels(*earlier, features)
    if tower.has_cls:
        features = ops.drop_first(features)
    features = merged_features(ops, spec.projector, features)
    *before, last = heads
    features, indices = ops.reduce(features, *last, before)
    embeds = run_steps(ops, spec.projector.steps, features)
    if not spec.taps:
        return embeds, indices
    rows = (tap_rows(ops, spec, tap, tapped[tap.block], indices) for tap in spec.taps)
    return ops.join_channels(embeds, *rows), indices


def _restored(
    ops: GraphOps[ValueT], states: ValueT, merged: tuple[ValueT, ValueT] | None
) -> ValueT:
    """States of all tokens that the tower began with, from those of what they were merged into."""
    return states if merged is None else ops.take(states, merged[1])


def tap_rows(
    ops: GraphOps[ValueT], spec: ModelSpec, tap: TapSpec, hidden: ValueT, indices: ValueT
) -> ValueT:
    """What a block of the tower adds to the decoder's rows of the visual tokens that are kept."""
    if spec.tower.has_cls:
        hidden = ops.drop_first(hidden)
    features = ops.take(merged_features(ops, spec.projector, hidden), indices)
    return run_steps(ops, tap.steps, features)


def merged_features(ops: GraphOps[ValueT], projector: ProjectorSpec, features: ValueT) -> ValueT:
    """Visual tokens before the projector's steps, from a picture's patches."""
    if projector.patch_norm is not None:
        features = ops.norm(features, projector.patch_norm.name)
    merge = ops.average_patches if projector.merge == "average" else ops.merge_patches
    return merge(features, projector.merge_factor)


def build_embedding(ops: GraphOps[ValueT], spec: ModelSpec, token_ids: ValueT) -> ValueT:
    """Token ids to embeddings; the tower adds nothing to rows of text."""
    embeds = ops.embed_tokens(token_ids)
    return ops.widen(embeds, spec.row_width) if spec.taps else embeds


def build_decoder(
    ops: GraphOps[ValueT],
    spec: ModelSpec,
    embeds: ValueT,
    drops: RowDrops[ValueT] | None = None,
) -> ValueT:
    """Embeddings to the logits of the last position, [1, 1, vocabulary].

    What follows the last block's attention is computed for the last position alone: no other
    position reaches an output.

    Args:
        ops: The operators.
        spec: The model.
        embeds: Rows of the call.
        drops: Where rows leave; `None` where all run through every block. Nothing that the tower
            adds may follow a place where they do.
    """
    decoder = spec.decoder
    hidden, *added = _decoder_inputs(ops, spec, embeds)
    normed = ops.norm(hidden, decoder.blocks[0].mixer.norm)
    for index, block in enumerate(decoder.blocks):
        joined = ops.linear(normed, *block.mixer.inputs)
        if drops is not None:
            joined, hidden = drops.before_attention(index, joined, hidden)
        mixed = decoder_mixer(ops, block.mixer, index, joined)
        if index == decoder.depth - 1:
            mixed, hidden = ops.last(mixed), ops.last(hidden)
        elif drops is not None:
            mixed, hidden = drops.after_attention(index, joined, mixed, hidden)
        normed, hidden = _after_mixer(ops, decoder, index, mixed, hidden, added)
    return ops.head(normed)


def build_prefill(ops: GraphOps[ValueT], spec: ModelSpec, embeds: ValueT) -> None:
    """Extends every cache by rows whose logits nobody reads.

    So there is no head, and nothing that follows the last block's attention.
    """
    decoder = spec.decoder
    hidden, *added = _decoder_inputs(ops, spec, embeds)
    normed = ops.norm(hidden, decoder.blocks[0].mixer.norm)
    for index, block in enumerate(decoder.blocks):
        mixed = decoder_mixer(ops, block.mixer, index, ops.linear(normed, *block.mixer.inputs))
        if index < decoder.depth - 1:
            normed, hidden = _after_mixer(ops, decoder, index, mixed, hidden, added)


def _decoder_inputs(ops: GraphOps[ValueT], spec: ModelSpec, embeds: ValueT) -> tuple[ValueT, ...]:
    """The hidden state that rows begin with, and what is added to it after the first blocks."""
    return ops.split_channels(embeds, spec.decoder.hidden_size) if spec.taps else (embeds,)


def _after_mixer(
    ops: GraphOps[ValueT],
    decoder: DecoderSpec,
    index: int,
    mixed: ValueT,
    hidden: ValueT,
    added: Sequence[ValueT],
) -> tuple[ValueT, ValueT]:
    """The rest of a block, and the norm before the next one or the head; the hidden state too."""
    block = decoder.blocks[index]
    following = decoder.norm if index == decoder.depth - 1 else decoder.blocks[index + 1].mixer.norm
    mixed = mixer_output(ops, block.mixer, mixed)
    normed, hidden = ops.add_norm(mixed, hidden, block.ffn.norm)
    inner = feed_forward(ops, block.ffn, normed, decoder.activation)
    if index < len(added):
        inner = ops.add(inner, added[index])
    return ops.add_norm(inner, hidden, following)
