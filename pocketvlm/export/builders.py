"""The three phone graphs, written once over operators that each target supplies.

What a graph is (which hidden state becomes a feature, where tokens are dropped, what is computed
for the last position alone) is said here and nowhere else; how it is computed is the target's: a
target implements `GraphOps` for its own kind of value. `TorchOps` implements it in plain torch,
which makes modules for targets that trace; the ONNX target emits nodes.

The signatures of the graphs are part of the bundle's contract and the same for every target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pocketvlm.bundle import TensorSignature
from pocketvlm.models.projector import run_steps
from pocketvlm.models.spec import FfnSpec, ModelSpec

__all__ = [
    "GraphOps",
    "Signatures",
    "TextRows",
    "build_decoder",
    "build_embedding",
    "build_vision",
    "cache_names",
    "decoder_signatures",
    "embedding_signatures",
    "vision_signatures",
]

ValueT = TypeVar("ValueT")
Signatures = tuple[tuple[TensorSignature, ...], tuple[TensorSignature, ...]]
"""Inputs and outputs of one graph."""


class GraphOps(Protocol[ValueT]):
    """Operators of one target, over its own values; layers are named as in the checkpoint.

    Values are float32 and have a batch of one: [1, tokens, channels].
    """

    def embed_patches(self, pixels: ValueT) -> ValueT:
        """Patches with their positions, after [CLS] where there is one: [1, tokens, hidden]."""
        ...

    def embed_tokens(self, token_ids: ValueT) -> ValueT:
        """Rows of the token embedding, [1, length, width]."""
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

    def attention(self, queries: ValueT, keys: ValueT, values: ValueT) -> ValueT:
        """The tower's attention of all tokens to all tokens, heads joined again."""
        ...

    def cached_attention(self, joined: ValueT, block: int, *names: str) -> ValueT:
        """The decoder's causal attention with rotary positions, extending the cache of a block."""
        ...

    def drop_first(self, inputs: ValueT) -> ValueT:
        """All tokens but the first."""
        ...

    def last(self, inputs: ValueT) -> ValueT:
        """The last token alone, [1, 1, channels]."""
        ...

    def merge_patches(self, features: ValueT, factor: int) -> ValueT:
        """Pixel shuffle, as `forward.merge_patches`."""
        ...

    def reduce(self, features: ValueT, queries: ValueT, keys: ValueT) -> tuple[ValueT, ValueT]:
        """The checkpoint's token reduction: kept features and their indices.

        Queries and keys are those of the feature block, [1, tokens, hidden], not scaled yet.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class TextRows(Generic[ValueT]):
    """Where visual rows end, in a decoder that runs them through its first layers only.

    Attributes:
        layers: Layers that visual rows run through.
        select: The rows of text of a hidden state.
    """

    layers: int
    select: Callable[[ValueT], ValueT]


def build_vision(ops: GraphOps[ValueT], spec: ModelSpec, pixels: ValueT) -> tuple[ValueT, ValueT]:
    """Pixels to the embeddings and indices of the visual tokens that are kept."""
    tower = spec.tower
    blocks = tower.blocks[: tower.feature_block + 1]
    hidden = ops.embed_patches(pixels)
    if tower.pre_norm is not None:
        hidden = ops.norm(hidden, tower.pre_norm)
    normed = ops.norm(hidden, blocks[0].attention.norm)
    for block, following in zip(blocks, (*blocks[1:], None), strict=True):
        attention, ffn = block.attention, block.ffn
        names = attention.inputs
        queries, keys, values = ops.split(ops.linear(normed, *names), *names)
        attended = ops.linear(ops.attention(queries, keys, values), attention.o)
        normed, hidden = ops.add_norm(attended, hidden, ffn.norm)
        inner = _ffn(ops, ffn, normed, tower.activation)
        if following is not None:
            normed, hidden = ops.add_norm(inner, hidden, following.attention.norm)
    if tower.has_post_norm:
        features, _ = ops.add_norm(inner, hidden, tower.post_norm)
    else:
        features = ops.add(inner, hidden)
    if tower.has_cls:
        features = ops.drop_first(features)
    features = ops.merge_patches(features, spec.projector.merge_factor)
    features, indices = ops.reduce(features, queries, keys)
    return run_steps(ops, spec.projector.steps, features), indices


def _ffn(ops: GraphOps[ValueT], ffn: FfnSpec, normed: ValueT, activation: str) -> ValueT:
    joined = ops.linear(normed, *ffn.inputs)
    if ffn.gate is None:
        inner = ops.activation(joined, activation)
    else:
        inner = ops.gated(joined, ffn.gate, ffn.up, activation)
    return ops.linear(inner, ffn.down)


def build_embedding(ops: GraphOps[ValueT], token_ids: ValueT) -> ValueT:
    """Token ids to embeddings."""
    return ops.embed_tokens(token_ids)


def build_decoder(
    ops: GraphOps[ValueT],
    spec: ModelSpec,
    embeds: ValueT,
    text_rows: TextRows[ValueT] | None = None,
) -> ValueT:
    """Embeddings to the logits of the last position, [1, 1, vocabulary].

    What follows the last block's attention is computed for the last position alone: no other
    position reaches an output. What follows the attention of the last block that visual rows run
    through is computed for rows of text alone, likewise.
    """
    decoder = spec.decoder
    hidden = embeds
    normed = ops.norm(hidden, decoder.blocks[0].attention.norm)
    following = (*(block.attention.norm for block in decoder.blocks[1:]), decoder.norm)
    for index, block in enumerate(decoder.blocks):
        attention, ffn = block.attention, block.ffn
        attended = ops.cached_attention(
            ops.linear(normed, *attention.inputs), index, *attention.inputs
        )
        if index == decoder.depth - 1:
            attended, hidden = ops.last(attended), ops.last(hidden)
        elif text_rows is not None and index == text_rows.layers - 1:
            attended, hidden = text_rows.select(attended), text_rows.select(hidden)
        attended = ops.linear(attended, attention.o)
        normed, hidden = ops.add_norm(attended, hidden, ffn.norm)
        inner = _ffn(ops, ffn, normed, decoder.activation)
        normed, hidden = ops.add_norm(inner, hidden, following[index])
    return ops.linear(normed, decoder.head)


def cache_names(spec: ModelSpec, prefix: str) -> tuple[str, ...]:
    """Names of the cache tensors, `{prefix}.{block}.key` and `.value`, block by block."""
    return tuple(
        f"{prefix}.{block}.{kind}"
        for block in range(spec.decoder.depth)
        for kind in ("key", "value")
    )


def vision_signatures(spec: ModelSpec, kept: int) -> Signatures:
    """Inputs and outputs of the vision graph that keeps `kept` visual tokens."""
    side = spec.tower.image_size
    return (
        (_float("pixel_values", 1, spec.tower.channels, side, side),),
        (_float("embeds", 1, kept, spec.decoder.hidden_size), _int("indices", 1, kept)),
    )


def embedding_signatures(spec: ModelSpec) -> Signatures:
    """Inputs and outputs of the embedding graph."""
    return (
        (_int("input_ids", 1, "length"),),
        (_float("embeds", 1, "length", spec.decoder.hidden_size),),
    )


def decoder_signatures(
    spec: ModelSpec, cache_dtype: str = "float32", visual_layers: int | None = None
) -> Signatures:
    """Inputs and outputs of the decoder graph.

    `capacity` is chosen by the caller, who binds past and present to the same buffers. Where visual
    rows end early, `text_rows` numbers the rows of text among those of the call, and the cache of
    later layers has its own length and capacity.
    """
    decoder = spec.decoder

    def cache(direction: str) -> tuple[TensorSignature, ...]:
        signatures = []
        for index, name in enumerate(cache_names(spec, direction)):
            is_late = visual_layers is not None and index // 2 >= visual_layers
            capacity = "text_capacity" if is_late else "capacity"
            shape = (1, decoder.kv_heads, capacity, decoder.head_dim)
            signatures.append(TensorSignature(name=name, dtype=cache_dtype, shape=shape))
        return tuple(signatures)

    late = () if visual_layers is None else (_int("text_rows", "text"), _int("past_text_length", 1))
    return (
        (
            _float("embeds", 1, "length", decoder.hidden_size),
            _int("position_ids", 1, "length"),
            _int("past_length", 1),
            *late,
            *cache("past"),
        ),
        (_float("logits", 1, 1, decoder.vocab_size), *cache("present")),
    )


def _float(name: str, *shape: int | str) -> TensorSignature:
    return TensorSignature(name=name, dtype="float32", shape=shape)


def _int(name: str, *shape: int | str) -> TensorSignature:
    return TensorSignature(name=name, dtype="int64", shape=shape)
