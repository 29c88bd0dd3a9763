"""Graphs for long calls of the decoder: one that fills its cache, and one that makes their weights.

In groups, a product scales every block of columns by itself, which costs many rows more than the
arithmetic. So long calls have a second graph, whose products are those of `byte_rows`. Its
weights are in no file: a second graph reads the decoder's codes and rounds each row once more, to
8 bits with one scale, when a runner starts. They enter the first as inputs, so that a runtime holds
one copy, which takes a byte for each weight.

The last row of a call, whose logits are wanted, is left to the decoder. What fills the cache needs
no head then, and nothing that follows the last block's attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto
from torch import Tensor

from pocketvlm.bundle import TensorSignature
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.export.onnx.byte_rows import narrow_rows, row_product
from pocketvlm.export.onnx.ops import OnnxOps
from pocketvlm.export.onnx.writer import CONTRIB, GraphWriter, WeightFile
from pocketvlm.export.signatures import Signatures, decoder_signatures
from pocketvlm.graph.builders import build_prefill
from pocketvlm.models.decoder import RopeSpec
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import PlanState
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.layout import AffineLayout, WeightLayout, has_groups, without_mask

__all__ = ["PrefillGraphs", "held_bytes", "made_bytes", "refuse_prefill", "write_prefill"]

_SCALE_BYTES = 4
_FLOAT_BYTES = 4
_END = np.iinfo(np.int64).max
_RMS_NORM_OPSET = 23  # the first with RMSNormalization
_SCATTER_OPSET = 24  # the first with TensorScatter


@dataclass(frozen=True, kw_only=True)
class PrefillGraphs:
    """Both graphs, ready to be saved.

    Attributes:
        prefill: Fills the cache.
        unpack: Makes its weights.
        signatures: Inputs and outputs of each.
    """

    prefill: GraphWriter
    unpack: GraphWriter
    signatures: tuple[Signatures, Signatures]


class _PrefillOps(OnnxOps):
    """Operators of the graph that fills the cache.

    Attributes:
        made: Weights that it is given, by the name of their product.
    """

    def __init__(self, graph: GraphWriter, checkpoint: Checkpoint) -> None:
        super().__init__(graph, checkpoint, accuracy_level=4)
        self.made: dict[str, list[AffineWeight]] = {}
        self._angles: dict[RopeSpec, list[str]] = {}

    def quantized_linear(
        self, inputs: str, name: str, forms: list[AffineWeight], bias: str | None
    ) -> str:
        if not has_groups(forms[0].layout, forms[0].in_features):
            return super().quantized_linear(inputs, name, forms, bias)
        self.made[name] = forms
        return row_product(self._graph, name, (inputs, *_names(name)), bias, is_made=True)

    def cached_attention(self, joined: str, block: int, *names: str) -> str:
        """Attention to an int8 cache as floats: the kernel widens it once for each head of queries.

        New rows are rounded by nodes and written in place; the kernel is given them, and those of
        the past, as what their codes stand for.
        """
        grid = self._checkpoint.cache_grid
        if grid is None:
            return super().cached_attention(joined, block, *names)
        decoder = self._spec.decoder
        attention, rope = decoder.attention(block), decoder.rope_of(block)
        label, layer = attention.module, decoder.attention_blocks.index(block)
        queries, keys, values = self._normed_heads(joined, attention)
        if not keys:
            queries, keys, values = self.split(joined, *names)
        angles = self._new_angles(rope)
        queries = self.turn(queries, angles, decoder.heads, rope, f"{label}.queries")
        keys = self.turn(keys, angles, decoder.kv_heads, rope, f"{label}.keys")
        new_keys, past_keys = self._round_states(keys, f"{block}.key", grid.keys[layer])
        new_values, past_values = self._round_states(values, f"{block}.value", grid.values[layer])
        attended, _, _ = self._graph.nodes(
            "GroupQueryAttention",
            [
                *(queries, new_keys, new_values, past_keys, past_values),
                *self._sequence_lengths(0),
                *("", "", "", self._masks.of(block) or ""),
            ],
            [label, f"{label}.all_keys", f"{label}.all_values"],
            name=label,
            domain=CONTRIB,
            num_heads=decoder.heads,
            kv_num_heads=decoder.kv_heads,
            **self._score_attributes(),
        )
        return attended

    def _new_angles(self, rope: RopeSpec) -> list[str]:
        """Cosines and sines of the rows of the call."""
        if rope not in self._angles:
            graph = self._graph
            axis = graph.constant("slice.0", np.array([0], np.int64))
            end = graph.constant(f"slice.{_END}", np.array([_END], np.int64))
            self._angles[rope] = [
                graph.node("Slice", [table, "past_length", end, axis], name=f"{table}.new")
                for table in self.rotary_rows(0, rope)
            ]
        return self._angles[rope]

    def _round_states(self, states: str, cache: str, scales: Tensor) -> tuple[str, str]:
        """Writes new keys or values to a cache; what it holds of them, and of the past, as floats.

        Args:
            states: float32 [1, rows, channels].
            cache: Name of the cache.
            scales: Of its codes, [kv_heads, head_dim].
        """
        graph, (heads, width) = self._graph, scales.shape
        flat = scales.flatten().numpy()
        inverse = graph.constant(f"{cache}.inverse", 1 / flat)
        spread = graph.node("Mul", [states, inverse], name=f"{cache}.spread")
        unit = graph.constant("int8.unit", np.array(1, np.float32))
        middle = graph.constant("int8.middle", np.array(0, np.int8))
        codes = graph.node("QuantizeLinear", [spread, unit, middle], name=f"{cache}.codes")
        rows = self._reshape(codes, [1, -1, heads, width], f"{cache}.by_head")
        rows = graph.node("Transpose", [rows], name=f"{cache}.rows", perm=[0, 2, 1, 3])
        past = f"past.{cache}"
        graph.node(
            "TensorScatter",
            [past, rows, "past_length"],
            name=f"{cache}.written",
            output=f"present.{cache}",
            axis=2,
        )
        first = graph.constant("slice.0", np.array([0], np.int64))
        axis = graph.constant("slice.2", np.array([2], np.int64))
        held = graph.node("Slice", [past, first, "past_length", axis], name=f"{cache}.held")
        each = graph.constant(f"{cache}.scales", flat)
        heads_apart = graph.constant(f"{cache}.head_scales", flat.reshape(heads, 1, width))
        new, old = (
            graph.node(
                "Mul",
                [graph.node("Cast", [part], name=f"{cache}.{kind}", to=TensorProto.FLOAT), factor],
                name=f"{cache}.{kind}_states",
            )
            for kind, part, factor in (("new", codes, each), ("old", held, heads_apart))
        )
        return new, old


def made_bytes(spec: ModelSpec, layouts: Mapping[LinearSpec, WeightLayout | None]) -> int:
    """Bytes of the weights that are made for the prefill graph."""
    return sum(
        linear.out_features * (linear.in_features + _SCALE_BYTES)
        for linear, layout in _multiplied(spec, layouts)
        if has_groups(layout, linear.in_features)
    )


def held_bytes(spec: ModelSpec, layouts: Mapping[LinearSpec, WeightLayout | None]) -> int:
    """Bytes that the prefill graph takes in memory: what is made, and what it holds once more."""
    held = made_bytes(spec, layouts)
    for linear, layout in _multiplied(spec, layouts):
        if not has_groups(layout, linear.in_features):
            is_integer = isinstance(without_mask(layout), AffineLayout)
            elements = linear.out_features * linear.in_features
            held += elements * (1 if is_integer else _FLOAT_BYTES)
    return held


def _multiplied(
    spec: ModelSpec, layouts: Mapping[LinearSpec, WeightLayout | None]
) -> list[tuple[LinearSpec, WeightLayout | None]]:
    """Matrices of the prefill graph: of the last block, those before its attention."""
    last = spec.decoder.blocks[-1].mixer.inputs
    return [
        (linear, layout)
        for linear, layout in layouts.items()
        if linear.part == "decoder"
        and (linear.block != spec.decoder.depth - 1 or linear.name in last)
    ]


def refuse_prefill(state: PlanState) -> tuple[str, ...]:
    """Why a model can have no prefill graph, each with what would work."""
    refused = []
    if not made_bytes(state.spec, state.layouts):
        refused.append(
            "int8_prefill_rows is set, and no layer of the decoder has integers in groups; leave "
            "it out, or give the decoder 2 to 8 bits in groups"
        )
    if state.visual_schedule is not None:
        refused.append(
            "int8_prefill_rows leaves the last row of a prompt to another call, and drop_tokens "
            "ranks visual rows by it; leave one of them out"
        )
    return tuple(refused)


def write_prefill(checkpoint: Checkpoint, weights: WeightFile) -> PrefillGraphs:
    """Builds both graphs.

    Args:
        checkpoint: A model that `refuse_prefill` says nothing of.
        weights: The file that holds the decoder's weights.
    """
    opset = _RMS_NORM_OPSET if checkpoint.cache_grid is None else _SCATTER_OPSET
    prefill = GraphWriter("prefill", weights, opset=opset)
    ops = _PrefillOps(prefill, checkpoint)
    build_prefill(ops, checkpoint.spec, "embeds")
    unpack = GraphWriter("unpack", weights, opset=opset)
    reader = OnnxOps(unpack, checkpoint, accuracy_level=4)
    made: list[TensorSignature] = []
    for number, (name, forms) in enumerate(ops.made.items()):
        label = f"r{number}"  # each product has many nodes, and their names are most of the graph
        rows, columns = sum(form.shape[0] for form in forms), forms[0].in_features
        dense = reader.quantized_rows(_all_rows(unpack, rows), label, forms)
        shape = unpack.constant(f"{label}.shape", np.array([rows, columns], np.int64))
        dense = unpack.node("Reshape", [dense, shape], name=f"{label}.dense")
        codes, scales = _names(name)
        narrow_rows(unpack, label, dense, (codes, scales))
        made += [
            TensorSignature(name=codes, dtype="uint8", shape=(columns, rows)),
            TensorSignature(name=scales, dtype="float32", shape=(rows,)),
        ]
    return PrefillGraphs(
        prefill=prefill,
        unpack=unpack,
        signatures=(_prefill_signatures(checkpoint, made), ((), tuple(made))),
    )


def _names(name: str) -> tuple[str, str]:
    """Codes and scales of a product, as both graphs call them."""
    return f"rows.{name}.codes", f"rows.{name}.scales"


def _all_rows(graph: GraphWriter, rows: int) -> str:
    """The numbers of all rows of a table, int64 [1, rows]."""
    bounds = [
        graph.constant(name, np.array(value, np.int64))
        for name, value in (("rows.first", 0), (f"rows.{rows}", rows), ("rows.next", 1))
    ]
    numbers = graph.node("Range", bounds, name="rows.range")
    axis = graph.constant("rows.axis", np.array([0], np.int64))
    return graph.node("Unsqueeze", [numbers, axis], name="rows.all")


def _prefill_signatures(checkpoint: Checkpoint, made: list[TensorSignature]) -> Signatures:
    cache = "float32" if checkpoint.cache_grid is None else "int8"
    inputs, (_logits, *presents) = decoder_signatures(checkpoint.spec, cache)
    return (*inputs, *made), tuple(presents)
