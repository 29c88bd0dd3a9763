"""The phone graphs' operators in ONNX, as ONNX Runtime's CPU kernels run them best."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import UnsupportedError
from pocketvlm.export.onnx.byte_rows import (
    RoundedOver,
    byte_codes,
    float_product,
    integer_product,
    table_rows,
)
from pocketvlm.export.onnx.expansion import affine_rows, codebook_matrix, codebook_rows
from pocketvlm.export.onnx.masks import Masks
from pocketvlm.export.onnx.reducer import trace_merge, trace_reducer
from pocketvlm.export.onnx.weights import gathers_blocks, narrowest_float, pack_weight
from pocketvlm.export.onnx.writer import CONTRIB, GraphWriter
from pocketvlm.graph.rotary import (
    inverse_frequencies,
    pair_selection,
    patch_angles,
    patch_positions,
)
from pocketvlm.models.blocks import AttentionSpec
from pocketvlm.models.decoder import RopeSpec
from pocketvlm.models.token_merging import TokenMerge
from pocketvlm.reference_graph.reducer_graph import MergeGraph, ReducerGraph
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.codebook import CodebookWeight
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["OnnxOps"]

# Operator and its `alpha` by the name that Hugging Face gives the activation.
_ACTIVATIONS: dict[str, tuple[str, float | None]] = {
    "gelu": ("Gelu", None),
    "gelu_pytorch_tanh": ("FastGelu", None),
    "quick_gelu": ("QuickGelu", 1.702),
    "silu": ("QuickGelu", 1.0),
}


class OnnxOps:
    """`GraphOps` over names of values in a graph under construction.

    Args:
        graph: Where nodes go.
        checkpoint: Where weights come from.
        accuracy_level: How products of integers are computed: 0 in float32, 4 with activations
            rounded to int8.
        rounded_over: Over what activations have one scale where a row of the weight has one; in
            groups it is a block of a row.
    """

    def __init__(
        self,
        graph: GraphWriter,
        checkpoint: Checkpoint,
        *,
        accuracy_level: int,
        rounded_over: RoundedOver = "row",
    ) -> None:
        self._graph = graph
        self._checkpoint = checkpoint
        self._spec = checkpoint.spec
        self._accuracy_level = accuracy_level
        self._rounded_over = rounded_over
        self._widths = {
            linear.name: linear.out_features for linear in checkpoint.spec.linears()
        } | {checkpoint.spec.decoder.head: checkpoint.spec.decoder.vocab_size}
        self._shared: dict[str, str] = {}
        self._masks = Masks(graph, checkpoint.spec.decoder)
        # Positions of the rows of this call that each stage of the decoder computes, [axes, rows].
        self._positions = ["position_ids"]

    @property
    def earlier_blocks(self) -> tuple[int, ...]:
        reducer = self._checkpoint.reducer
        return () if reducer is None else reducer.earlier_blocks

    def embed_patches(self, pixels: str) -> str:
        tower = self._spec.tower
        model, name = self._checkpoint.model, tower.embeddings
        convolution = cast("Any", model.get_submodule(tower.patch_embedding))
        inputs = [pixels, self._float(f"{tower.patch_embedding}.weight", convolution.weight)]
        if convolution.bias is not None:
            inputs.append(self._float(f"{tower.patch_embedding}.bias", convolution.bias))
        size = [tower.patch_size, tower.patch_size]
        patches = self._graph.node(
            "Conv", inputs, name=tower.patch_embedding, kernel_shape=size, strides=size
        )
        shape = self._graph.constant(
            f"{name}.shape", np.array([1, tower.hidden_size, -1], dtype=np.int64)
        )
        patches = self._graph.node("Reshape", [patches, shape], name=f"{name}.flatten")
        patches = self._graph.node("Transpose", [patches], name=f"{name}.tokens", perm=[0, 2, 1])
        if tower.class_embedding is not None:
            cls = getattr(model.get_submodule(name), tower.class_embedding).view(1, 1, -1)
            token = self._float(f"{name}.{tower.class_embedding}", cls)
            patches = self._graph.node("Concat", [token, patches], name=f"{name}.cls", axis=1)
        if tower.position_embedding is None:
            return patches
        # Row by row: the patches of one whole picture are in raster order.
        learned = cast("Any", model.get_submodule(tower.position_embedding)).weight
        table = (
            patch_positions(tower, learned.detach().to(torch.float32))
            if tower.table_side
            else learned
        )
        positions = self._float(f"{name}.positions", table[None])
        return self._graph.node("Add", [patches, positions], name=f"{name}.add_positions")

    def embed_tokens(self, token_ids: str) -> str:
        rows, scale = self._embed_rows(token_ids), self._spec.decoder.embed_scale
        return rows if scale == 1.0 else self._times(rows, scale, f"{rows}.scaled")

    def _embed_rows(self, token_ids: str) -> str:
        name = self._spec.decoder.embedding
        form = self._checkpoint.form(name).without_mask()
        if isinstance(form, AffineWeight):
            return self.quantized_rows(token_ids, name, [form])
        if isinstance(form, CodebookWeight):
            return codebook_rows(self._graph, name, form, token_ids)
        table, data_type = narrowest_float(_dense(name, form))
        stored = self._graph.constant(f"{name}.weight", table, data_type=data_type)
        rows = self._graph.node("Gather", [stored, token_ids], name=name)
        if data_type == onnx.TensorProto.FLOAT:
            return rows
        # Cast after the look-up, so that the table stays narrow in memory.
        return self._graph.node("Cast", [rows], name=f"{name}.float32", to=onnx.TensorProto.FLOAT)

    def linear(self, inputs: str, *names: str) -> str:
        forms = [self._checkpoint.form(name).without_mask() for name in names]
        if _can_join(forms):
            return self._linear(inputs, names, forms)
        parts = [
            self._linear(inputs, [name], [form]) for name, form in zip(names, forms, strict=True)
        ]
        return self._graph.node("Concat", parts, name=_joined(names), axis=-1)

    def split(self, joined: str, *names: str) -> tuple[str, ...]:
        widths = np.array([self._widths[name] for name in names], dtype=np.int64)
        sizes = self._graph.constant(f"{_joined(names)}.widths", widths)
        label = self._graph.unique(f"{_joined(names)}.split")
        outputs = [f"{label}.{index}" for index in range(len(names))]
        return self._graph.nodes("Split", [joined, sizes], outputs, name=label, axis=-1)

    def norm(self, inputs: str, name: str) -> str:
        module = self._norm_module(name)
        weight = self._float(f"{name}.weight", module.weight, narrow=False)
        if not _is_layer_norm(module):
            return self._graph.node(
                "RMSNormalization", [inputs, weight], name=name, epsilon=self._epsilon(module)
            )
        bias = self._float(f"{name}.bias", module.bias, narrow=False)
        return self._graph.node(
            "LayerNormalization", [inputs, weight, bias], name=name, epsilon=self._epsilon(module)
        )

    def add_norm(self, inputs: str, residual: str, name: str) -> tuple[str, str]:
        # One node would do both, and take three times as long as the two where rows are many.
        total = self._graph.node("Add", [inputs, residual], name=f"{name}.sum")
        return self.norm(total, name), total

    def add(self, left: str, right: str) -> str:
        return self._graph.node("Add", [left, right], name="add")

    def activation(self, inputs: str, kind: str) -> str:
        if kind not in _ACTIVATIONS:
            raise UnsupportedError(
                f"activation {kind!r} has no ONNX Runtime kernel; there are "
                f"{', '.join(_ACTIVATIONS)}"
            )
        operator, alpha = _ACTIVATIONS[kind]
        return self._graph.node(
            operator, [inputs], name=f"{inputs}.{kind}", domain=CONTRIB, alpha=alpha
        )

    def gated(self, joined: str, gate: str, up: str, kind: str) -> str:
        opened, values = self.split(joined, gate, up)
        opened = self.activation(opened, kind)
        return self._graph.node("Mul", [opened, values], name=f"{joined}.gated")

    def attention(
        self,
        queries: str,
        keys: str,
        values: str,
        window: int | None = None,
        sizes: str | None = None,
    ) -> str:
        tower, label = self._spec.tower, f"{queries}.attention"
        if sizes is not None:
            return self._weighed_attention(queries, keys, values, sizes)
        operands = [queries, keys, values]
        if tower.rope_theta is not None:
            operands[:2] = [self._turn_patches(part) for part in operands[:2]]
        if window is not None:
            operands = [self._split_windows(part, window) for part in operands]
        attended = self._graph.node(
            "MultiHeadAttention", operands, name=label, domain=CONTRIB, num_heads=tower.heads
        )
        return attended if window is None else self._join_windows(attended, window)

    def _weighed_attention(self, queries: str, keys: str, values: str, sizes: str) -> str:
        """Attention in which a key counts as often as its size says.

        The fused kernel takes no weights, and a bias makes it leave its fast path. Each head of the
        values gets their sizes as a further channel instead, and its others are multiplied by them:
        sum(p s v) / sum(p s) is what it is to be.
        """
        tower, graph, label = self._spec.tower, self._graph, f"{queries}.attention"
        heads, width = tower.heads, tower.head_dim
        apart = self._reshape(values, [1, -1, heads, width], f"{label}.values")
        each = self._reshape(sizes, [1, -1, 1, 1], f"{label}.sizes")
        weighed = graph.node("Mul", [apart, each], name=f"{label}.weighed")
        shape = graph.constant(f"{label}.heads", np.array([1, 1, heads, 1], dtype=np.int64))
        counts = graph.node("Expand", [each, shape], name=f"{label}.counts")
        weighed = graph.node("Concat", [weighed, counts], name=f"{label}.counted", axis=-1)
        joined = self._reshape(weighed, [1, -1, heads * (width + 1)], f"{label}.joined")
        attended = graph.node(
            "MultiHeadAttention",
            [queries, keys, joined],
            name=label,
            domain=CONTRIB,
            num_heads=heads,
        )
        attended = self._reshape(attended, [1, -1, heads, width + 1], f"{label}.apart")
        parts = graph.constant("sizes.parts", np.array([width, 1], dtype=np.int64))
        total, weight = graph.nodes(
            "Split",
            [attended, parts],
            [f"{label}.total", f"{label}.weight"],
            name=f"{label}.split",
            axis=-1,
        )
        mean = graph.node("Div", [total, weight], name=f"{label}.mean")
        return self._reshape(mean, [1, -1, tower.hidden_size], f"{label}.output")

    def merge_tokens(
        self,
        merge: TokenMerge,
        hidden: str,
        queries: str,
        keys: str,
        before: tuple[str, str] | None,
    ) -> tuple[str, str, str]:
        traced = trace_merge(merge, self._spec, opset=self._graph.opset)
        values = (hidden, queries, keys, *(before or ()))
        named = dict(zip(MergeGraph(merge, self._spec).names, values, strict=True))
        merged, sizes, places = self._graph.inline(traced, named, f"merge_{merge.block}")
        return merged, sizes, places

    def _turn_patches(self, joined: str) -> str:
        """Queries or keys at the rows and columns of their patches."""
        tower, graph = self._spec.tower, self._graph
        cosine, sine = (angles[0, :, : tower.head_dim // 2] for angles in patch_angles(tower))
        operands = [
            joined,
            graph.constant("patches.first", np.zeros(1, np.int64)),
            graph.constant("patches.cosine", cosine.numpy()),
            graph.constant("patches.sine", sine.numpy()),
        ]
        return graph.node("RotaryEmbedding", operands, name=f"{joined}.turned", domain=CONTRIB)

    def _split_windows(self, joined: str, side: int) -> str:
        """[1, patches, hidden] as [windows, side**2, hidden]."""
        tower = self._spec.tower
        down, across, width = tower.rows // side, tower.columns // side, tower.hidden_size
        grid = self._reshape(joined, [down, side, across, side * width], f"{joined}.grid")
        grid = self._graph.node("Transpose", [grid], name=f"{joined}.windows", perm=[0, 2, 1, 3])
        return self._reshape(grid, [down * across, side * side, width], f"{joined}.split")

    def _join_windows(self, attended: str, side: int) -> str:
        """What `_split_windows` took apart."""
        tower = self._spec.tower
        down, across, width = tower.rows // side, tower.columns // side, tower.hidden_size
        grid = self._reshape(attended, [down, across, side, side * width], f"{attended}.grid")
        grid = self._graph.node("Transpose", [grid], name=f"{attended}.rows", perm=[0, 2, 1, 3])
        return self._reshape(grid, [1, tower.patches, width], f"{attended}.joined")

    def cached_attention(self, joined: str, block: int, *names: str) -> str:
        decoder = self._spec.decoder
        schedule = self._checkpoint.visual_schedule
        stage = 0 if schedule is None else schedule.stage_of(block)
        before, total = self._sequence_lengths(stage)
        cosine, sine = self.rotary_rows(stage, decoder.rope_of(block))
        attention = decoder.attention(block)
        label = attention.module
        attended, _, _ = self._graph.nodes(
            "GroupQueryAttention",
            [
                *self._normed_heads(joined, attention),
                f"past.{block}.key",
                f"past.{block}.value",
                before,
                total,
                cosine,
                sine,
                *self._masks_and_scales(label, block),
            ],
            [label, f"present.{block}.key", f"present.{block}.value"],
            name=label,
            domain=CONTRIB,
            num_heads=decoder.heads,
            kv_num_heads=decoder.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            **self._cache_attributes(),
            **self._score_attributes(),
        )
        return attended

    def head(self, normed: str) -> str:
        logits = self.linear(normed, self._spec.decoder.head)
        softcap = self._spec.decoder.logit_softcap
        if softcap is None:
            return logits
        bounded = self._graph.node(
            "Tanh", [self._times(logits, 1 / softcap, "logits.share")], name="logits.bounded"
        )
        return self._times(bounded, softcap, "logits.capped")

    def _normed_heads(self, joined: str, attention: AttentionSpec) -> tuple[str, str, str]:
        """Queries, keys and values as the attention takes them: packed, where no head has a norm.

        The operator could apply them itself, but not in its CPU kernel.
        """
        if attention.q_norm is None and attention.k_norm is None:
            return joined, "", ""
        queries, keys, values = self.split(joined, *attention.inputs)
        width = self._spec.decoder.head_dim
        if attention.q_norm is not None:
            queries = self._head_norm(queries, attention.q_norm, width, self._widths[attention.q])
        if attention.k_norm is not None:
            keys = self._head_norm(keys, attention.k_norm, width, self._widths[attention.k])
        return queries, keys, values

    def head_part(self, joined: str, attention: AttentionSpec, name: str, norm: str | None) -> str:
        """Queries or keys alone, of a block of the decoder, after the norm of each head."""
        names = attention.inputs
        start = sum(self._widths[before] for before in names[: names.index(name)])
        end = start + self._widths[name]
        part = self._slice(joined, start, end, axis=2, name=f"{joined}.part")
        if norm is None:
            return part
        return self._head_norm(part, norm, self._spec.decoder.head_dim, self._widths[name])

    def turn(
        self, joined: str, angles: Sequence[str], heads: int, rope: RopeSpec, name: str
    ) -> str:
        """Queries or keys [1, rows, channels] by the cosines and sines of their rows."""
        first = self._graph.constant("slice.0", np.array([0], dtype=np.int64))
        is_partial = rope.width < self._spec.decoder.head_dim
        return self._graph.node(
            "RotaryEmbedding",
            [joined, first, *angles],
            name=name,
            domain=CONTRIB,
            num_heads=heads if is_partial else None,
            rotary_embedding_dim=rope.width if is_partial else None,
        )

    def norm_heads(self, joined: str, name: str) -> str:
        tower = self._spec.tower
        return self._head_norm(joined, name, tower.head_dim, tower.hidden_size)

    def _head_norm(self, joined: str, name: str, width: int, every: int) -> str:
        heads = self._reshape(joined, [1, -1, every // width, width], f"{name}.heads")
        return self._reshape(self.norm(heads, name), [1, -1, every], f"{name}.joined")

    def _reshape(self, inputs: str, shape: Sequence[int], name: str) -> str:
        sizes = self._graph.constant(f"{name}.shape", np.array(shape, dtype=np.int64))
        return self._graph.node("Reshape", [inputs, sizes], name=name)

    def short_conv(self, joined: str, block: int, *names: str) -> str:
        graph, conv = self._graph, self._spec.decoder.convolutions[block]
        label, end = conv.module, np.iinfo(np.int64).max
        before, after, values = self.split(joined, *names)
        values = graph.node("Mul", [before, values], name=f"{label}.gated")
        state = f"past.{block}.conv"
        window = graph.node("Concat", [state, values], name=f"{label}.window", axis=1)
        kept = self._slice(window, 1 - conv.taps, end, axis=1, name=f"{label}.state")
        self.output(kept, f"present.{block}.conv")
        kernel = cast("Any", self._checkpoint.model.get_submodule(conv.kernel))
        parts = []
        for tap in range(conv.taps):
            # Rows that this tap sees: as many as are new, from row `tap` of the window on.
            stop = tap + 1 - conv.taps or end
            name = f"{conv.kernel}.{tap}"
            rows = self._slice(window, tap, stop, axis=1, name=f"{name}.rows")
            weight = self._float(f"{name}.weight", kernel.weight[:, 0, tap], narrow=False)
            parts.append(graph.node("Mul", [rows, weight], name=name))
        if kernel.bias is not None:
            parts.append(self._float(f"{conv.kernel}.bias", kernel.bias, narrow=False))
        total = graph.node("Sum", parts, name=f"{conv.kernel}.sum")
        return graph.node("Mul", [after, total], name=label)

    def join_channels(self, *parts: str) -> str:
        return self._graph.node("Concat", list(parts), name="features", axis=-1)

    def drop_first(self, inputs: str) -> str:
        return self._slice(inputs, 1, np.iinfo(np.int64).max, axis=1, name="drop_cls")

    def last(self, inputs: str) -> str:
        return self._slice(inputs, -1, np.iinfo(np.int64).max, axis=1, name=f"{inputs}.last")

    def merge_patches(self, features: str, factor: int) -> str:
        if factor == 1:
            return features
        tower = self._spec.tower
        rows, columns = tower.rows // factor, tower.columns // factor
        width = factor * tower.feature_size
        grid = np.array([rows, factor, columns, width], dtype=np.int64)
        merged = np.array([1, rows * columns, factor * width], dtype=np.int64)
        features = self._graph.node(
            "Reshape", [features, self._graph.constant("merge.grid", grid)], name="merge.cells"
        )
        features = self._graph.node(
            "Transpose", [features], name="merge.transpose", perm=[0, 2, 1, 3]
        )
        return self._graph.node(
            "Reshape", [features, self._graph.constant("merge.shape", merged)], name="merge"
        )

    def average_patches(self, features: str, factor: int) -> str:
        tower = self._spec.tower
        rows, columns, width = tower.rows // factor, tower.columns // factor, tower.hidden_size
        grid = np.array([rows, factor, columns, factor, width], dtype=np.int64)
        pooled = np.array([1, rows * columns, width], dtype=np.int64)
        features = self._graph.node(
            "Reshape", [features, self._graph.constant("pool.grid", grid)], name="pool.cells"
        )
        axes = self._graph.constant("pool.axes", np.array([1, 3], dtype=np.int64))
        features = self._graph.node("ReduceMean", [features, axes], name="pool.mean", keepdims=0)
        return self._graph.node(
            "Reshape", [features, self._graph.constant("pool.shape", pooled)], name="pool"
        )

    def split_channels(self, joined: str, width: int) -> tuple[str, ...]:
        count = self._spec.row_width // width
        sizes = self._graph.constant("channels.widths", np.full(count, width, dtype=np.int64))
        outputs = [f"{joined}.channels.{index}" for index in range(count)]
        return self._graph.nodes(
            "Split", [joined, sizes], outputs, name=f"{joined}.channels", axis=-1
        )

    def widen(self, inputs: str, width: int) -> str:
        added = width - self._spec.decoder.hidden_size
        pads = self._graph.constant("channels.added", np.array([0] * 5 + [added], np.int64))
        return self._graph.node("Pad", [inputs, pads], name=f"{inputs}.wide")

    def take(self, features: str, indices: str) -> str:
        flat = self._reshape(indices, [-1], f"{features}.indices")
        return self._graph.node("Gather", [features, flat], name=f"{features}.taken", axis=1)

    def reduce(
        self,
        features: str,
        queries: str,
        keys: str,
        earlier: Sequence[tuple[str, str]] = (),
    ) -> tuple[str, str]:
        reducer = self._checkpoint.reducer
        if reducer is None:
            every = np.arange(self._spec.visual_tokens, dtype=np.int64)[None]
            return features, self._graph.constant("reducer.all", every)
        traced = trace_reducer(reducer, self._spec, opset=self._graph.opset)
        values = (features, queries, keys, *chain.from_iterable(earlier))
        named = dict(zip(ReducerGraph(reducer, self._spec).names, values, strict=True))
        kept, indices = self._graph.inline(traced, named, "reducer")
        return kept, indices

    def output(self, value: str, name: str) -> None:
        """Gives a value the name of a graph's output."""
        self._graph.node("Identity", [value], name=name, output=name)

    def _linear(self, inputs: str, names: Sequence[str], forms: list[WeightForm]) -> str:
        name = _joined(names)
        bias = self._bias(names)
        if all(isinstance(form, AffineWeight) for form in forms):
            affine = cast("list[AffineWeight]", forms)
            return self.quantized_linear(inputs, name, affine, bias)
        if isinstance(forms[0], CodebookWeight):
            expanded = codebook_matrix(self._graph, name, forms[0])
            product = self._graph.node("MatMul", [inputs, expanded], name=name)
        else:
            dense = torch.cat([_dense(name, form) for form in forms])
            product = self._graph.node(
                "FusedMatMul",
                [inputs, self._float(f"{name}.weight", dense)],
                name=name,
                domain=CONTRIB,
                transB=1,
            )
        return self._biased(product, bias, name)

    def _biased(self, product: str, bias: str | None, name: str) -> str:
        if bias is None:
            return product
        return self._graph.node("Add", [product, bias], name=f"{name}.biased")

    def _byte_rows(self, name: str, forms: Sequence[AffineWeight]) -> tuple[str, str]:
        codes = self._graph.constant(f"{name}.codes", byte_codes(forms))
        return codes, self._scales(name, torch.cat([form.scales[:, 0] for form in forms]).numpy())

    def quantized_linear(
        self, inputs: str, name: str, forms: list[AffineWeight], bias: str | None
    ) -> str:
        """A product with integers of one layout, whose rows are joined."""
        if forms[0].layout.has_byte_rows(forms[0].in_features):
            rows = (inputs, *self._byte_rows(name, forms))
            if self._accuracy_level:
                return integer_product(
                    self._graph, name, rows, bias, rounded_over=self._rounded_over
                )
            product = float_product(self._graph, name, rows)
            return self._biased(product, bias, name)
        packed = pack_weight(forms)
        operands = [
            inputs,
            self._graph.constant(f"{name}.codes", packed.codes),
            self._scales(name, packed.scales),
            self._zeros(name, packed.zeros),
            "",
            bias or "",
        ]
        return self._graph.node(
            "MatMulNBits",
            operands,
            name=name,
            domain=CONTRIB,
            K=packed.in_features,
            N=packed.out_features,
            bits=packed.bits,
            block_size=packed.block_size,
            accuracy_level=self._accuracy_level,
        )

    def quantized_rows(self, ids: str, name: str, forms: list[AffineWeight]) -> str:
        """Rows of a table of integers, float32 [1, L, width], by their numbers [1, L]."""
        (form, *_) = forms
        if form.layout.has_byte_rows(form.in_features):
            return table_rows(self._graph, name, *self._byte_rows(name, forms), ids)
        packed = pack_weight(forms)
        if not gathers_blocks(packed):
            return affine_rows(self._graph, name, packed, ids)
        codes = packed.codes.reshape(packed.out_features, -1)
        operands = [
            self._graph.constant(f"{name}.codes", codes),
            ids,
            self._scales(name, packed.scales),
        ]
        if packed.zeros is not None:
            operands.append(self._graph.constant(f"{name}.zeros", packed.zeros))
        rows = self._graph.node(
            "GatherBlockQuantized",
            operands,
            name=name,
            domain=CONTRIB,
            bits=packed.bits,
            block_size=packed.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        if form.groups * form.group_size == form.in_features:
            return rows
        return self._slice(rows, 0, form.in_features, axis=2, name=f"{name}.unpad")

    def _scales(self, name: str, scales: np.ndarray) -> str:
        # Stored as float16, cast once: ONNX Runtime folds the cast when the session starts.
        stored = self._graph.constant(f"{name}.scales", scales)
        return self._graph.node(
            "Cast", [stored], name=f"{name}.scales_float32", to=onnx.TensorProto.FLOAT
        )

    def _zeros(self, name: str, zeros: np.ndarray | None) -> str:
        if zeros is None:
            return ""
        stored = self._graph.constant(f"{name}.zeros", zeros)
        if zeros.dtype == np.uint8:
            return stored
        return self._graph.node(
            "Cast", [stored], name=f"{name}.zeros_float32", to=onnx.TensorProto.FLOAT
        )

    def _float(self, name: str, values: Tensor, *, narrow: bool = True) -> str:
        """A float32 constant, stored in the narrowest type that is exact.

        Args:
            name: Its name.
            values: Its content.
            narrow: Whether a narrower type may be looked for.
        """
        if not narrow:
            return self._graph.constant(name, values.detach().to(torch.float32).numpy())
        array, data_type = narrowest_float(values)
        stored = self._graph.constant(name, array, data_type=data_type)
        if data_type == onnx.TensorProto.FLOAT:
            return stored
        return self._graph.node("Cast", [stored], name=f"{name}_float32", to=onnx.TensorProto.FLOAT)

    def _bias(self, names: Sequence[str]) -> str | None:
        layers = [self._checkpoint.layer(name) for name in names]
        biases = [getattr(layer, "bias", None) for layer in layers]
        if all(bias is None for bias in biases):
            return None
        filled = [
            torch.zeros(self._widths[name]) if bias is None else bias
            for name, bias in zip(names, biases, strict=True)
        ]
        return self._float(f"{_joined(names)}.bias", torch.cat(filled), narrow=False)

    def _slice(self, inputs: str, start: int, end: int, *, axis: int, name: str) -> str:
        bounds = [
            self._graph.constant(f"slice.{value}", np.array([value], dtype=np.int64))
            for value in (start, end, axis)
        ]
        return self._graph.node("Slice", [inputs, *bounds], name=name)

    def _norm_module(self, name: str) -> Any:
        return self._checkpoint.model.get_submodule(name)

    @staticmethod
    def _epsilon(module: Any) -> float:
        return float(module.eps)

    def _masks_and_scales(self, name: str, block: int) -> tuple[str, ...]:
        """What is added to scores, and scales of an int8 cache; nothing where there is neither."""
        mask, grid = self._masks.of(block), self._checkpoint.cache_grid
        if grid is None:
            return () if mask is None else ("", mask)
        layer = self._spec.decoder.attention_blocks.index(block)
        keys = self._graph.constant(f"{name}.key_scales", grid.keys[layer].numpy())
        values = self._graph.constant(f"{name}.value_scales", grid.values[layer].numpy())
        return ("", mask or "", "", keys, values)

    def _cache_attributes(self) -> dict[str, Any]:
        grid = self._checkpoint.cache_grid
        if grid is None:
            return {}
        return {
            "k_quant_type": "PER_CHANNEL",
            "v_quant_type": "PER_CHANNEL",
            "kv_cache_bit_width": grid.bits,
        }

    def _score_attributes(self) -> dict[str, Any]:
        """How scores are masked and bounded, where that is more than causal."""
        decoder = self._spec.decoder
        attributes: dict[str, Any] = {"causal": 0} if decoder.has_masks else {}
        if decoder.score_softcap is not None:
            attributes["softcap"] = decoder.score_softcap
        return attributes

    def _times(self, inputs: str, factor: float, name: str) -> str:
        constant = self._graph.constant(f"{name}.factor", np.array(factor, dtype=np.float32))
        return self._graph.node("Mul", [inputs, constant], name=name)

    def _sequence_lengths(self, stage: int) -> tuple[str, str]:
        """`seqlens_k` (one less than the total) and the total, as the attention wants them."""
        label = _label(stage)
        if f"{label}total" not in self._shared:
            graph = self._graph
            length = graph.node("Shape", [self._positions[stage]], name=f"{label}length", start=1)
            total = graph.node("Add", [self.past_of(stage), length], name=f"{label}total_length")
            total = graph.node(
                "Cast", [total], name=f"{label}total_int32", to=onnx.TensorProto.INT32
            )
            one = graph.constant("one", np.array([1], dtype=np.int32))
            scalar = graph.constant("scalar", np.zeros(0, dtype=np.int64))
            before = graph.node("Sub", [total, one], name=f"{label}last_index")
            self._shared[f"{label}before"] = before
            self._shared[f"{label}total"] = graph.node(
                "Reshape", [total, scalar], name=f"{label}total"
            )
        return self._shared[f"{label}before"], self._shared[f"{label}total"]

    def past_of(self, stage: int) -> str:
        """Rows that the layers of a stage hold of earlier calls, [1]."""
        if stage == 0:
            return "past_length"
        name = f"{_label(stage)}past_length"
        if name not in self._shared:
            self._shared[name] = self._slice(
                "past_stage_lengths", stage - 1, stage, axis=0, name=name
            )
        return self._shared[name]

    def enter_stage(self, rows: str) -> None:
        """Continues with fewer rows of the call, by their indices [left] among those before."""
        name = f"{_label(len(self._positions))}position_ids"
        self._positions.append(
            self._graph.node("Gather", [self._positions[-1], rows], name=name, axis=1)
        )

    def rotary_rows(self, stage: int, rope: RopeSpec) -> tuple[str, str]:
        """Cosines and sines by cache slot, [total or more, head_dim / 2].

        The attention rotates the token of slot i by row i of its table, and offers no other way
        to give a prompt positions with gaps (it reads the first of a prompt's position ids only).
        So it is given rows that were looked up by position; slots of the past are rotated already.
        Where a stage numbers the rows that it holds, slots are positions.
        """
        kind_of = "" if rope == self._spec.decoder.rope else "sliding."
        label = _label(stage) + kind_of
        schedule = self._checkpoint.visual_schedule
        if rope.axes > 1:
            self._turn_rows(stage)
        if f"{label}cosine" not in self._shared:
            if f"{kind_of}cosines" not in self._shared:
                tables = self._rotary_tables(rope, f"{kind_of}rotary")
                self._shared[f"{kind_of}cosines"], self._shared[f"{kind_of}sines"] = tables
            if stage and schedule is not None and schedule.positions == "consecutive":
                return self._shared[f"{kind_of}cosines"], self._shared[f"{kind_of}sines"]
            graph, name = self._graph, f"{label}positions"
            flat = graph.constant("flat", np.array([-1], dtype=np.int64))
            positions = graph.node("Reshape", [self._positions[stage], flat], name=name)
            none = graph.constant("none", np.array([0], dtype=np.int64))
            pads = graph.node("Concat", [self.past_of(stage), none], name=f"{name}.pads", axis=0)
            slots = graph.node("Pad", [positions, pads], name=f"{name}.by_slot")
            for kind in ("cosine", "sine"):
                table = self._shared[f"{kind_of}{kind}s"]
                self._shared[f"{label}{kind}"] = graph.node(
                    "Gather", [table, slots], name=f"{label}rotary.{kind}"
                )
        return self._shared[f"{label}cosine"], self._shared[f"{label}sine"]

    def _turn_rows(self, stage: int) -> None:
        """The same where a position has several axes, each of which turns some pairs of channels.

        A product with a matrix that has one number a column takes each pair's angle from its axis.
        """
        label, graph, rope = _label(stage), self._graph, self._spec.decoder.rope
        if f"{label}cosine" in self._shared:
            return
        name = f"{label}positions"
        positions = graph.node(
            "Cast", [self._positions[stage]], name=f"{name}.float32", to=onnx.TensorProto.FLOAT
        )
        positions = graph.node("Transpose", [positions], name=name, perm=[1, 0])
        matrix = pair_selection(rope) * inverse_frequencies(rope)
        frequencies = graph.constant("rotary.frequencies", matrix.numpy())
        angles = graph.node("MatMul", [positions, frequencies], name=f"{label}rotary.angles")
        none = graph.constant("none", np.array([0], dtype=np.int64))
        pads = graph.node(
            "Concat", [self.past_of(stage), none, none, none], name=f"{name}.pads", axis=0
        )
        for kind, operator in (("cosine", "Cos"), ("sine", "Sin")):
            values = graph.node(operator, [angles], name=f"{label}rotary.{kind}s")
            self._shared[f"{label}{kind}"] = graph.node(
                "Pad", [values, pads], name=f"{label}rotary.{kind}"
            )

    def _rotary_tables(self, rope: RopeSpec, label: str) -> tuple[str, str]:
        """Cosines and sines of every position; computed when the session starts, not stored."""
        decoder, graph = self._spec.decoder, self._graph
        frequencies = inverse_frequencies(rope)
        bounds = [
            graph.constant(f"{label}.{name}", np.array(value, dtype=np.int64))
            for name, value in (("start", 0), ("limit", decoder.max_positions), ("delta", 1))
        ]
        positions = graph.node("Range", bounds, name=f"{label}.range")
        positions = graph.node(
            "Cast", [positions], name=f"{label}.float32", to=onnx.TensorProto.FLOAT
        )
        column = graph.constant(f"{label}.column", np.array([-1, 1], dtype=np.int64))
        positions = graph.node("Reshape", [positions, column], name=f"{label}.rows")
        row = graph.constant(f"{label}.frequencies", frequencies[None].numpy())
        angles = graph.node("Mul", [positions, row], name=f"{label}.angles")
        cosines = graph.node("Cos", [angles], name=f"{label}.cosines")
        return cosines, graph.node("Sin", [angles], name=f"{label}.sines")


def _label(stage: int) -> str:
    """What names of values of a stage of the decoder begin with."""
    return f"stage{stage}." if stage else ""


def _can_join(forms: list[WeightForm]) -> bool:
    # Codebooks stay apart: to join what they expand to would hold all of it once more.
    layouts = {form.layout for form in forms}
    return len(layouts) == 1 and not isinstance(forms[0], CodebookWeight)


def _dense(name: str, form: WeightForm) -> Tensor:
    if not isinstance(form, DenseWeight):
        raise UnsupportedError(
            f"{name}: a weight of kind {form.kind!r} cannot be exported to ONNX; there are "
            f"{AffineWeight.kind}, {CodebookWeight.kind}, {DenseWeight.kind}, "
            f"{SparseWeight.kind}"
        )
    return form.values


def _is_layer_norm(module: Any) -> bool:
    return isinstance(module, nn.LayerNorm)


def _joined(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    prefix = names[0].rpartition(".")[0]
    return f"{prefix}.{'_'.join(name.rpartition('.')[2] for name in names)}"
