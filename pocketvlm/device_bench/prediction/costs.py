"""What a model's vision graph computes, operator by operator, from its specification alone.

An answer is three sequences of operators: the vision graph once per tile, the decoder
(`decoder_work`) once for the prompt, and once for each further token. `roofline` gives them times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from pocketvlm.bundle import VisualSchedule
from pocketvlm.device_bench.prediction.operators import (
    Elementwise,
    PlainOperator,
    Product,
    TowerAttention,
)
from pocketvlm.device_bench.prediction.rates import BYTE_ROWS_KERNEL, FLOAT_KERNEL
from pocketvlm.models.blocks import FfnSpec
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

__all__ = ["ExportedModel", "feed_forward", "products", "vision_operators"]

_ROUNDING_NODES = 4


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """A model as a bundle holds it.

    Attributes:
        spec: What the model is.
        kernels: What multiplies with each weight matrix.
        visual_tokens: Tokens of a tile that enter the decoder.
        visual_schedule: Where they leave the decoder; `None` where they do not.
        least_prefill_rows: Rows of a call from which a graph of int8 rows runs all but the last;
            `None` where there is no such graph.
    """

    spec: ModelSpec
    kernels: Mapping[LinearSpec, str]
    visual_tokens: int
    visual_schedule: VisualSchedule | None = None
    least_prefill_rows: int | None = None

    def kernel(self, name: str) -> str:
        """What multiplies with the matrix of this module."""
        return self.kernels[self.linear(name)]

    def linear(self, name: str) -> LinearSpec:
        """The matrix of this module."""
        return self._linears[name]

    def in_prefill(self) -> ExportedModel:
        """The same with the products of the graph for long calls."""
        kernels = {
            linear: BYTE_ROWS_KERNEL
            if linear.part == "decoder" and kernel != FLOAT_KERNEL
            else kernel
            for linear, kernel in self.kernels.items()
        }
        return replace(self, kernels=kernels, least_prefill_rows=None)

    @cached_property
    def _linears(self) -> Mapping[str, LinearSpec]:
        return {linear.name: linear for linear in self.kernels}


def vision_operators(model: ExportedModel) -> Iterator[PlainOperator]:
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
        yield from products(model, attention.inputs, tokens)
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
        yield from products(model, (attention.o,), tokens)
        merge = tower.merge_in(index)
        if merge is not None:
            yield from _merge(tower, merge, tokens)
            tokens = tower.tokens_after(merge)
        yield Elementwise(kind="norm", elements=tokens * hidden)
        yield from feed_forward(model, block.ffn, tokens, tower.activation)
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


def _merge(tower: TowerSpec, merge: TokenMerge, tokens: int) -> Iterator[PlainOperator]:
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


def feed_forward(
    model: ExportedModel, ffn: FfnSpec, rows: int, activation: str
) -> Iterator[PlainOperator]:
    """A feed-forward network, with the norm after it where there is one."""
    width = model.linear(ffn.up).out_features
    yield from products(model, ffn.inputs, rows)
    if ffn.gate is not None:
        yield Elementwise(kind="copy", elements=2 * rows * width)
    yield Elementwise(kind=activation, elements=rows * width)
    if ffn.gate is not None:
        yield Elementwise(kind="copy", elements=rows * width)
    yield from products(model, (ffn.down,), rows)
    if ffn.post_norm is not None:
        yield Elementwise(kind="norm", elements=rows * model.linear(ffn.down).out_features)


def _projector(model: ExportedModel, steps: Iterable[ProjectorStep]) -> Iterator[PlainOperator]:
    rows = model.visual_tokens
    spec = model.spec
    width = spec.projector.merged_width(spec.tower.feature_size)
    for step in steps:
        if isinstance(step, LinearStep):
            yield from products(model, (step.name,), rows)
            width = step.out_features
        elif isinstance(step, NormStep):
            yield Elementwise(kind="norm", elements=rows * width)
        elif isinstance(step, GatedStep):
            yield from products(model, (step.gate, step.up), rows)
            width = step.out_features
            yield Elementwise(kind="copy", elements=2 * rows * width)
            yield Elementwise(kind=step.activation, elements=rows * width)
            yield Elementwise(kind="copy", elements=rows * width)
        elif isinstance(step, ActivationStep):
            yield Elementwise(kind=step.activation, elements=rows * width)


def products(model: ExportedModel, names: tuple[str, ...], rows: int) -> Iterator[PlainOperator]:
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
