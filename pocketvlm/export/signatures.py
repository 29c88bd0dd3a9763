"""Signatures of the graphs: part of the bundle's contract, and the same for every target."""

from __future__ import annotations

from pocketvlm.bundle import TensorSignature, VisualSchedule
from pocketvlm.models.spec import ModelSpec

__all__ = [
    "Signatures",
    "cache_names",
    "decoder_signatures",
    "embedding_signatures",
    "vision_signatures",
]

Signatures = tuple[tuple[TensorSignature, ...], tuple[TensorSignature, ...]]
"""Inputs and outputs of one graph."""


def cache_names(spec: ModelSpec, prefix: str) -> tuple[str, ...]:
    """Names of the cache tensors, block by block.

    They are `{prefix}.{block}.key` and `.value`, or `.conv`, the state of a short convolution.
    """
    convolutions = spec.decoder.convolutions
    return tuple(
        f"{prefix}.{block}.{kind}"
        for block in range(spec.decoder.depth)
        for kind in (("conv",) if block in convolutions else ("key", "value"))
    )


def vision_signatures(spec: ModelSpec, kept: int) -> Signatures:
    """Inputs and outputs of the vision graph that keeps `kept` visual tokens."""
    tower = spec.tower
    return (
        (_float("pixel_values", 1, tower.channels, tower.height, tower.width),),
        (_float("embeds", 1, kept, spec.row_width), _int("indices", 1, kept)),
    )


def embedding_signatures(spec: ModelSpec) -> Signatures:
    """Inputs and outputs of the embedding graph."""
    return (
        (_int("input_ids", 1, "length"),),
        (_float("embeds", 1, "length", spec.row_width),),
    )


def decoder_signatures(
    spec: ModelSpec, cache_dtype: str = "float32", schedule: VisualSchedule | None = None
) -> Signatures:
    """Inputs and outputs of the decoder graph.

    `capacity` is chosen by the caller, who binds past and present to the same buffers, save for
    states of short convolutions, which have one size, [1, taps - 1, width]. Where visual rows are
    dropped on the way, `text_rows` numbers the rows of text among those of the call,
    `past_stage_lengths` says how many rows the layers after each drop hold, and the caches of each
    such stage have their own capacity. Where rows see each other, `mutual` has a number for each
    row, -1 for those that see the past alone.
    """
    decoder = spec.decoder

    def cache(direction: str) -> tuple[TensorSignature, ...]:
        signatures = []
        for name in cache_names(spec, direction):
            block = int(name.split(".")[1])
            if block in decoder.convolutions:
                rows = decoder.convolutions[block].taps - 1
                signatures.append(_float(name, 1, rows, decoder.hidden_size))
                continue
            stage = 0 if schedule is None else schedule.stage_of(block)
            capacity = f"stage{stage}_capacity" if stage else "capacity"
            shape = (1, decoder.kv_heads, capacity, decoder.head_dim)
            signatures.append(TensorSignature(name=name, dtype=cache_dtype, shape=shape))
        return tuple(signatures)

    dropped = (
        ()
        if schedule is None
        else (_int("text_rows", "text"), _int("past_stage_lengths", len(schedule.drops)))
    )
    return (
        (
            _float("embeds", 1, "length", spec.row_width),
            _int("position_ids", decoder.rope.axes, "length"),
            _int("past_length", 1),
            *dropped,
            *(() if decoder.mutual_rows is None else (_int("mutual", 1, "length"),)),
            *cache("past"),
        ),
        (_float("logits", 1, 1, decoder.vocab_size), *cache("present")),
    )


def _float(name: str, *shape: int | str) -> TensorSignature:
    return TensorSignature(name=name, dtype="float32", shape=shape)


def _int(name: str, *shape: int | str) -> TensorSignature:
    return TensorSignature(name=name, dtype="int64", shape=shape)
