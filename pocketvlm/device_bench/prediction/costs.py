"""What a model's graphs compute, operator by operator, from its specification alone.

An answer is three sequences of operators: the vision graph once per tile, the decoder once for the
prompt, and once for each further token. `roofline` gives them times; here they are only counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from pocketvlm.bundle import VisualSchedule
from pocketvlm.device_bench.prediction.rates import BYTE_ROWS_KERNEL, FLOAT_KERNEL
from pocketvlm.models.blocks import BlockSpec, FfnSpec
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.projector import (
    ActivationStep,
    GatedStep,
    LinearStep,
    NormStep,
    ProjectorStep,
)
from pocketvlm.models.spec import ModelSpec
from pocketvlm.models.token_merging import ImportantTokens, SimilarTokens, TokenMerge
from pocketvlm.models.tower import TowerSpec

__all__ = [
    "CachedAttention",
    "Elementwise",
    "ExportedModel",
    "Operator",
    "Product",
    "TowerAttention",
    "decoder_operators",
    "vision_operators",
]


@dataclass(frozen=True, kw_only=True)
class Product:
    """Rows times a weight matrix.

    Attributes:
        kernel: What multiplies them, as `Rates.products` names it.
        rows: Rows of the input.
        weights: Elements of the matrix.
    """

    kernel: str
    rows: int
    weights: int

    @property
    def macs(self) -> int:
        """Multiplications with an addition each."""
        return self.rows * self.weights


@dataclass(frozen=True, kw_only=True)
class TowerAttention:
    """Attention among patches.

    Attributes:
        macs: Of scores and sums.
    """

    macs: int


@dataclass(frozen=True, kw_only=True)
class CachedAttention:
    """Attention of a decoder's block to its cache.

    Attributes:
        rows: New rows.
        macs: Of scores and sums with all rows that there are then.
    """

    rows: int
    macs: int


@dataclass(frozen=True, kw_only=True)
class Elementwise:
    """A node that reads and writes every element once.

    Attributes:
        kind: `norm`, `copy`, or the name of an activation.
        elements: How many.
    """

    kind: str
    elements: int


_ROUNDING_NODES = 4

Operator = Product | TowerAttention | CachedAttention | Elementwise


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """A model as a bundle holds it.

    Attributes:
        spec: What the model is.
        kernels: What multiplies with each weight matrix.
        visual_tokens: Tokens of a tile that enter the decoder.
        visual_schedule: Where they leave the decoder; `None` where they do not.
    """

    spec: ModelSpec
    kernels: Mapping[LinearSpec, str]
    visual_tokens: int
    visual_schedule: VisualSchedule | None = None

    def kernel(self, name: str) -> str:
        """What multiplies with the matrix of this module."""
        return self.kernels[self.linear(name)]

    def linear(self, name: str) -> LinearSpec:
        """The matrix of this module."""
        return self._linears[name]

    @cached_property
    def _linears(self) -> Mapping[str, LinearSpec]:
        return {linear.name: linear for linear in self.kernels}


def vision_operators(model: ExportedModel) -> Iterator[Operator]:
    """The vision graph: the pixels of one tile to the visual tokens that are kept."""
    spec = model.spec
    tower = spec.tower
    tokens, hidden = tower.tokens, tower.hidden_size
    patch_weights = tower.channels * tower.patch_size**2 * hidden
    yield Product(kernel=FLOAT_KERNEL, rows=tower.patches, weights=patch_weights)
    yield Elementwise(kind="copy", elements=2 * tokens * hidden)
    for index, block in enumerate(tower.blocks[: tower.feature_block + 1]):
        attention, tokens = block.attention, tower.tokens_entering(index)
        yield Elementwise(kind="norm", elements=tokens * hidden)
        yield from _products(model, attention.inputs, tokens)
        yield Elementwise(kind="copy", elements=3 * tokens * hidden)
        for norm in (attention.q_norm, attention.k_norm):
            if norm is not None:
                yield Elementwise(kind="norm", elements=tokens * hidden)
        if tower.rope_theta is not None:
            yield Elementwise(kind="copy", elements=2 * tokens * hidden)
        if attention.window is not None:
            yield Elementwise(kind="copy", elements=4 * tokens * hidden)
        seen = tokens if attention.window is None else attention.window**2
        yield TowerAttention(macs=2 * tokens * seen * hidden)
        if tower.weighs_tokens(index):
            yield Elementwise(kind="copy", elements=4 * tokens * hidden)
        yield from _products(model, (attention.o,), tokens)
        merge = tower.merge_in(index)
        if merge is not None:
            yield from _merge(tower, merge, tokens)
            tokens = tower.tokens_after(merge)
        yield Elementwise(kind="norm", elements=tokens * hidden)
        yield from _feed_forward(model, block.ffn, tokens, tower.activation)
    yield Elementwise(kind="norm", elements=tokens * hidden)
    tokens = tower.tokens
    if tower.merges:
        yield Elementwise(kind="copy", elements=3 * tokens * hidden)
    if spec.projector.patch_norm is not None:
        yield Elementwise(kind="norm", elements=tokens * tower.feature_size)
    yield Elementwise(kind="copy", elements=tokens * tower.feature_size)
    if model.visual_tokens < spec.visual_tokens:
        yield TowerAttention(macs=tokens * tokens * hidden)  # the reducer scores every token
    for steps in (spec.projector.steps, *(tap.steps for tap in spec.taps)):
        yield from _projector(model, steps)


def _merge(tower: TowerSpec, merge: TokenMerge, tokens: int) -> Iterator[Operator]:
    """The merge of a block: what tokens are compared by, and products with one-hot rows."""
    hidden, after = tower.hidden_size, tower.tokens_after(merge)
    products: list[tuple[int, int]] = []
    if isinstance(merge, SimilarTokens):
        half = (tokens - int(tower.has_cls)) // 2
        products.append((half, half * tower.head_dim))
    if isinstance(merge, SimilarTokens | ImportantTokens) and merge.reads_attention:
        products.append((1 if tower.has_cls else tokens, tokens * hidden))
    if merge != tower.merges[0]:
        products.append((after, tokens))  # what the tokens stood for before
    products.append((after, tokens * hidden))
    for rows, weights in products:
        yield Product(kernel=FLOAT_KERNEL, rows=rows, weights=weights)
    yield Elementwise(kind="copy", elements=after * tokens + 2 * tokens * hidden)


def decoder_operators(
    model: ExportedModel,
    *,
    text_rows: int,
    visual_rows: int = 0,
    past: int = 0,
    past_visual: int = 0,
) -> Iterator[Operator]:
    """The decoder's graph, once.

    Args:
        model: The model.
        text_rows: New rows of text.
        visual_rows: New rows of pictures.
        past: Rows in the cache of the first layer.
        past_visual: Visual rows among them.
    """
    decoder, schedule = model.spec.decoder, model.visual_schedule
    hidden, last = decoder.hidden_size, decoder.depth - 1
    rows, seen = text_rows + visual_rows, past
    for index, block in enumerate(decoder.blocks):
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
                yield from _ranking(model, entering, seen)
        after = 1 if index == last else after
        yield Elementwise(kind="norm", elements=entering * hidden)
        yield from _products(model, block.mixer.inputs, entering)
        if isinstance(block, BlockSpec):
            width = decoder.heads * decoder.head_dim
            for norm in (block.attention.q_norm, block.attention.k_norm):
                if norm is not None:
                    yield Elementwise(kind="norm", elements=before * width)
            yield CachedAttention(rows=before, macs=2 * before * (before + seen) * width)
        else:
            for _ in range(3 + 2 * block.conv.taps):
                yield Elementwise(kind="copy", elements=before * hidden)
        yield from _products(model, (block.mixer.output,), after)
        if isinstance(block, BlockSpec) and block.attention.post_norm is not None:
            yield Elementwise(kind="norm", elements=after * hidden)
        yield Elementwise(kind="norm", elements=after * hidden)
        yield from _feed_forward(model, block.ffn, after, decoder.activation)
    yield Elementwise(kind="norm", elements=hidden)
    yield from _products(model, (decoder.embedding if decoder.tied_head else decoder.head,), 1)


def _ranks(schedule: VisualSchedule, layer: int) -> bool:
    """Whether the attention of a layer ranks visual rows."""
    drops = (schedule.drop_in(layer, after_attention=after) for after in (False, True))
    return any(drop is not None and schedule.drops[drop].keep for drop in drops)


def _ranking(model: ExportedModel, rows: int, seen: int) -> Iterator[Operator]:
    """The last row's attention: every key is turned, read and multiplied once."""
    decoder = model.spec.decoder
    keys = rows * decoder.kv_heads * decoder.head_dim
    yield Elementwise(kind="copy", elements=2 * keys)
    macs = (rows + seen) * decoder.heads * decoder.head_dim
    yield CachedAttention(rows=1, macs=macs)
    yield Elementwise(kind="copy", elements=rows * decoder.hidden_size)


def _feed_forward(
    model: ExportedModel, ffn: FfnSpec, rows: int, activation: str
) -> Iterator[Operator]:
    width = model.linear(ffn.up).out_features
    yield from _products(model, ffn.inputs, rows)
    if ffn.gate is not None:
        yield Elementwise(kind="copy", elements=2 * rows * width)
    yield Elementwise(kind=activation, elements=rows * width)
    if ffn.gate is not None:
        yield Elementwise(kind="copy", elements=rows * width)
    yield from _products(model, (ffn.down,), rows)
    if ffn.post_norm is not None:
        yield Elementwise(kind="norm", elements=rows * model.linear(ffn.down).out_features)


def _projector(model: ExportedModel, steps: Iterable[ProjectorStep]) -> Iterator[Operator]:
    rows = model.visual_tokens
    spec = model.spec
    width = spec.projector.merged_width(spec.tower.feature_size)
    for step in steps:
        if isinstance(step, LinearStep):
            yield from _products(model, (step.name,), rows)
            width = step.out_features
        elif isinstance(step, NormStep):
            yield Elementwise(kind="norm", elements=rows * width)
        elif isinstance(step, GatedStep):
            yield from _products(model, (step.gate, step.up), rows)
            width = step.out_features
            yield Elementwise(kind="copy", elements=2 * rows * width)
            yield Elementwise(kind=step.activation, elements=rows * width)
            yield Elementwise(kind="copy", elements=rows * width)
        elif isinstance(step, ActivationStep):
            yield Elementwise(kind=step.activation, elements=rows * width)


def _products(model: ExportedModel, names: tuple[str, ...], rows: int) -> Iterator[Operator]:
    """Products with matrices that share an input: one node where one kernel runs them all."""
    kernels = {model.kernel(name) for name in names}
    groups = [names] if len(kernels) == 1 else [(name,) for name in names]
    for group in groups:
        linears = [model.linear(name) for name in group]
        weights = sum(linear.in_features * linear.out_features for linear in linears)
        kernel = model.kernel(group[0])
        yield Product(kernel=kernel, rows=rows, weights=weights)
        outputs = rows * sum(linear.out_features for linear in linears)
        if kernel == FLOAT_KERNEL and any(linear.has_bias for linear in linears):
            yield Elementwise(kind="copy", elements=outputs)
        if kernel == BYTE_ROWS_KERNEL and linears[0].part not in ("tower", "projector"):
            # Nodes that round each row by itself, and scale and shift what the kernel returns.
            for _ in range(_ROUNDING_NODES):
                yield Elementwise(kind="copy", elements=rows * linears[0].in_features)
            for _ in range(1 + any(linear.has_bias for linear in linears)):
                yield Elementwise(kind="copy", elements=outputs)
    if len(groups) > 1:
        total = rows * sum(model.linear(name).out_features for name in names)
        yield Elementwise(kind="copy", elements=total)
