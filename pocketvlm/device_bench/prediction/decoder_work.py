"""What a decoder computes, counted layer by layer for one row; rows of a call multiply it.

A bundle holds these counts (`work`), so that a measurement can be held against a prediction
wherever the bundle is, without the specification that they were counted from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from pocketvlm.bundle import VisualSchedule
from pocketvlm.device_bench.prediction.costs import ExportedModel, feed_forward, products
from pocketvlm.device_bench.prediction.operators import (
    CachedAttention,
    Elementwise,
    Operator,
    Work,
    add_up,
)
from pocketvlm.json_io import OPTIONAL
from pocketvlm.models.blocks import BlockSpec, DecoderBlock

__all__ = ["DecoderWork", "LayerWork", "PrefillWork", "count_decoder", "decoder_operators"]

_MOST_LAYERS = 4096
_WIDEST = 2**24


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """Layers that follow each other and are alike, each for one row.

    Attributes:
        entering: What a row runs that enters a layer: its first norm, and what reads it.
        mixing: What a row runs among others that the layer keeps, beside scores and sums.
        leaving: What a row runs after that, to the end of the layer.
        query_width: Channels of all queries; 0 where there is a convolution in their place.
        key_width: Channels of all keys, likewise.
        layers: How many layers.
    """

    entering: Work
    mixing: Work
    leaving: Work
    query_width: int
    key_width: int
    layers: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.layers <= _MOST_LAYERS:
            raise ValueError(f"layers must be 1 to {_MOST_LAYERS:,}")
        if not (0 <= self.query_width <= _WIDEST and 0 <= self.key_width <= _WIDEST):
            raise ValueError(f"query_width and key_width must be 0 to {_WIDEST:,}")


@dataclass(frozen=True, kw_only=True)
class PrefillWork:
    """A graph that runs all rows of long calls but the last, up to the last layer's attention.

    Attributes:
        least_rows: Rows of a call from which it is used.
        runs: Its layers in order.
    """

    least_rows: int
    runs: tuple[LayerWork, ...]

    def __post_init__(self) -> None:
        if self.least_rows < 2:  # noqa: PLR2004  (one is the last)
            raise ValueError(f"least_rows is {self.least_rows}; it must be at least 2")
        if not 1 <= sum(run.layers for run in self.runs) <= _MOST_LAYERS:
            raise ValueError(f"a prefill graph has 1 to {_MOST_LAYERS:,} layers")


@dataclass(frozen=True, kw_only=True)
class DecoderWork:
    """A decoder.

    Attributes:
        runs: Its layers in order.
        head: What the last row runs after them.
        hidden_size: Channels of a row.
        vocab_size: Logits.
        visual_schedule: Where visual rows leave it; `None` where they do not.
        prefill: Its graph for long calls; `None` where it runs them itself.
    """

    runs: tuple[LayerWork, ...]
    head: Work
    hidden_size: int
    vocab_size: int
    visual_schedule: VisualSchedule | None = field(default=None, metadata=OPTIONAL)
    prefill: PrefillWork | None = field(default=None, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= _MOST_LAYERS:
            raise ValueError(f"a decoder has 1 to {_MOST_LAYERS:,} layers")
        if not (1 <= self.hidden_size <= _WIDEST and 1 <= self.vocab_size <= _WIDEST):
            raise ValueError(f"hidden_size and vocab_size must be 1 to {_WIDEST:,}")
        if self.visual_schedule is not None:
            self.visual_schedule.require_depth(self.depth)

    @property
    def depth(self) -> int:
        """Layers."""
        return sum(run.layers for run in self.runs)

    def each_layer(self) -> Iterator[LayerWork]:
        """Every layer alone."""
        return _each_layer(self.runs)


def count_decoder(model: ExportedModel) -> DecoderWork:
    """Counts what a model's decoder runs of one row."""
    decoder, least = model.spec.decoder, model.least_prefill_rows
    prefill = None
    if least is not None and model.visual_schedule is None:
        prefill = PrefillWork(least_rows=least, runs=_count_layers(model.in_prefill()))
    head = decoder.embedding if decoder.tied_head else decoder.head
    return DecoderWork(
        runs=_count_layers(model),
        head=add_up([_norm(decoder.hidden_size), *products(model, (head,), 1)]),
        hidden_size=decoder.hidden_size,
        vocab_size=decoder.vocab_size,
        visual_schedule=model.visual_schedule,
        prefill=prefill,
    )


def _count_layers(model: ExportedModel) -> tuple[LayerWork, ...]:
    runs: list[LayerWork] = []
    for block in model.spec.decoder.blocks:
        layer = _count_layer(model, block)
        if runs and replace(runs[-1], layers=1) == layer:
            layer = replace(layer, layers=runs.pop().layers + 1)
        runs.append(layer)
    return tuple(runs)


def _count_layer(model: ExportedModel, block: DecoderBlock) -> LayerWork:
    decoder = model.spec.decoder
    hidden = decoder.hidden_size
    mixing: list[Elementwise] = []
    post_norm, query_width, key_width = None, 0, 0
    if isinstance(block, BlockSpec):
        attention, post_norm = block.attention, block.attention.post_norm
        query_width = decoder.heads * decoder.head_dim
        key_width = decoder.kv_heads * decoder.head_dim
        norms = [name for name in (attention.q_norm, attention.k_norm) if name is not None]
        mixing += [_norm(query_width) for _ in norms]
    else:
        copies = 3 + 2 * block.conv.taps
        mixing += [Elementwise(kind="copy", elements=hidden) for _ in range(copies)]
    return LayerWork(
        entering=add_up([_norm(hidden), *products(model, block.mixer.inputs, 1)]),
        mixing=add_up(mixing),
        leaving=add_up(
            [
                *products(model, (block.mixer.output,), 1),
                *([] if post_norm is None else [_norm(hidden)]),
                _norm(hidden),
                *feed_forward(model, block.ffn, 1, decoder.activation),
            ]
        ),
        query_width=query_width,
        key_width=key_width,
    )


def _norm(width: int) -> Elementwise:
    return Elementwise(kind="norm", elements=width)


def decoder_operators(
    decoder: DecoderWork,
    *,
    text_rows: int,
    visual_rows: int = 0,
    past: int = 0,
    past_visual: int = 0,
) -> Iterator[Operator]:
    """A call of the decoder, by one graph or two.

    Args:
        decoder: The decoder.
        text_rows: New rows of text.
        visual_rows: New rows of pictures.
        past: Rows in the cache of the first layer.
        past_visual: Visual rows among them.
    """
    schedule, last = decoder.visual_schedule, decoder.depth - 1
    rows, seen = text_rows + visual_rows, past
    if decoder.prefill is not None and rows >= decoder.prefill.least_rows:
        yield from _prefill_operators(decoder.prefill, rows - 1, past)
        text_rows, visual_rows, rows, seen = 1, 0, 1, past + rows - 1
    for index, layer in enumerate(decoder.each_layer()):
        entering = before = after = rows
        if schedule is not None:
            stage = schedule.stage_of(index)
            before = text_rows + schedule.kept(stage, visual_rows)
            seen = past - past_visual + schedule.kept(stage, past_visual)
            entering = after = before
            drop = schedule.drop_in(index, after_attention=False)
            if drop is not None:
                entering = text_rows + schedule.kept(stage - 1, visual_rows)
            drop = schedule.drop_in(index, after_attention=True)
            if drop is not None:
                after = text_rows + schedule.kept(stage + 1, visual_rows)
            if visual_rows and _ranks(schedule, index):
                yield from _ranking(layer, entering, seen, decoder.hidden_size)
        after = 1 if index == last else after
        yield from layer.entering.of_rows(entering)
        yield from layer.mixing.of_rows(before)
        if layer.query_width:
            macs = 2 * before * (before + seen) * layer.query_width
            yield CachedAttention(rows=before, macs=macs)
        yield from layer.leaving.of_rows(after)
    yield from decoder.head.of_rows(1)


def _each_layer(runs: Iterable[LayerWork]) -> Iterator[LayerWork]:
    for run in runs:
        yield from (replace(run, layers=1) for _ in range(run.layers))


def _prefill_operators(prefill: PrefillWork, rows: int, past: int) -> Iterator[Operator]:
    *before, last = _each_layer(prefill.runs)
    for layer in (*before, last):
        yield from layer.entering.of_rows(rows)
        yield from layer.mixing.of_rows(rows)
        if layer.query_width:
            yield CachedAttention(rows=rows, macs=2 * rows * (rows + past) * layer.query_width)
        if layer is not last:
            yield from layer.leaving.of_rows(rows)


def _ranks(schedule: VisualSchedule, layer: int) -> bool:
    """Whether the attention of a layer ranks visual rows."""
    drops = (schedule.drop_in(layer, after_attention=after) for after in (False, True))
    return any(drop is not None and schedule.drops[drop].keep for drop in drops)


def _ranking(layer: LayerWork, rows: int, seen: int, hidden: int) -> Iterator[Operator]:
    """The last row's attention: every key is turned, read and multiplied once."""
    yield Elementwise(kind="copy", elements=2 * rows * layer.key_width)
    yield CachedAttention(rows=1, macs=(rows + seen) * layer.query_width)
    yield Elementwise(kind="copy", elements=rows * hidden)
