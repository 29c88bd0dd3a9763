"""The phone graphs' operators in MIL, as float16 hardware computes them safely.

What would go wrong in float16 is written so that it cannot: root mean squares are computed by the
layer norm operator, which does not leave squares of large activations in float16; queries are
scaled before their product with the keys; what is masked gets a large finite number instead of
infinity; cosines and sines come from a table, since angles of thousands have no digits left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import UnsupportedError
from pocketvlm.export.coreml.cache import DecoderCache
from pocketvlm.export.coreml.constexpr import narrow_float
from pocketvlm.export.coreml.conv_states import ConvStates
from pocketvlm.export.coreml.positions import DecoderPositions, turn
from pocketvlm.export.coreml.reducer import inline
from pocketvlm.export.coreml.weights import pack_weight
from pocketvlm.export.coreml.writer import FunctionWriter, identifier
from pocketvlm.graph.rotary import patch_angles, patch_positions
from pocketvlm.graph.tensor_ops import split_windows
from pocketvlm.models.token_merging import TokenMerge

__all__ = ["MilOps"]

# Operator and its options by the name that Hugging Face gives the activation.
_ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "gelu": ("gelu", {"mode": "EXACT"}),
    "gelu_pytorch_tanh": ("gelu", {"mode": "TANH_APPROXIMATION"}),
    "quick_gelu": ("gelu", {"mode": "SIGMOID_APPROXIMATION"}),
    "relu": ("relu", {}),
    "silu": ("silu", {}),
}


class MilOps:
    """`GraphOps` over values of a function under construction.

    Layers that share their input stay apart, one operator a layer: their joined outputs are a
    tuple.

    Args:
        function: Where operators go.
        checkpoint: Where weights come from.
        reducer: The token reducer as a program, or `None`.
        merges: Merges of tokens within the tower as programs, by the blocks that they are in.
        positions: For the decoder: which rows a call has, and where they are.
        cache: For the decoder: its cache.
        states: For the decoder: states of its short convolutions.
    """

    def __init__(
        self,
        function: FunctionWriter,
        checkpoint: Checkpoint,
        *,
        reducer: Any = None,
        merges: Mapping[int, Any] | None = None,
        positions: DecoderPositions | None = None,
        cache: DecoderCache | None = None,
        states: ConvStates | None = None,
    ) -> None:
        from coremltools.converters.mil.mil import Builder

        self._mb = Builder
        self._function = function
        self._checkpoint = checkpoint
        self._spec = checkpoint.spec
        self._reducer = reducer
        self._merges = merges or {}
        self._positions = positions
        self._cache = cache
        self._states = states
        self._float_type = function.package.float_type
        self._short = "fp16" if self._float_type is np.float16 else "fp32"
        self._names: dict[str, int] = {}

    def _sized(self, name: str) -> str:
        """The name of a constant that pictures of another size have otherwise."""
        tower = self._spec.tower
        return f"{name}_{tower.width}x{tower.height}" if tower.takes_any_size else name

    @property
    def earlier_blocks(self) -> tuple[int, ...]:
        reducer = self._checkpoint.reducer
        return () if reducer is None else reducer.earlier_blocks

    def embed_patches(self, pixels: Any) -> Any:
        tower = self._spec.tower
        model, name = self._checkpoint.model, tower.embeddings
        convolution = cast("Any", model.get_submodule(tower.patch_embedding))
        operands = {"weight": self._float(f"{tower.patch_embedding}.weight", convolution.weight)}
        if convolution.bias is not None:
            operands["bias"] = self._float(f"{tower.patch_embedding}.bias", convolution.bias)
        size = [tower.patch_size, tower.patch_size]
        pixels = self._mb.cast(x=pixels, dtype=self._short, name="pixels")
        patches = self._mb.conv(
            x=pixels, strides=size, pad_type="valid", **operands, name="patches"
        )
        flat = [1, tower.hidden_size, tower.patches]
        patches = self._reshape(patches, flat, "patches_flat")
        patches = self._transpose(patches, [0, 2, 1], "patches_tokens")
        if tower.class_embedding is not None:
            token = getattr(model.get_submodule(name), tower.class_embedding)
            cls = self._float(f"{name}.{tower.class_embedding}", token.view(1, 1, -1))
            patches = self._mb.concat(values=[cls, patches], axis=1, name="patches_cls")
        if tower.position_embedding is None:
            return patches
        # Row by row: the patches of one whole image are in raster order.
        learned = cast("Any", model.get_submodule(tower.position_embedding)).weight.detach()
        table = self._float(self._sized(f"{name}.positions"), patch_positions(tower, learned)[None])
        return self._mb.add(x=patches, y=table, name="patches_positions")

    def embed_tokens(self, token_ids: Any) -> Any:
        name = self._spec.decoder.embedding
        table = self._weight(name)
        rows = self._mb.gather(x=table, indices=token_ids, axis=0, name="embedding_rows")
        decoder = self._spec.decoder
        rows = self._first_columns(rows, decoder.hidden_size, "embedding_row")
        if decoder.embed_scale == 1.0:
            return rows
        return self._mb.mul(
            x=rows, y=self._float_type(decoder.embed_scale), name="embedding_scaled"
        )

    def linear(self, inputs: Any, *names: str) -> Any:
        outputs = tuple(self._linear(inputs, name) for name in names)
        return outputs[0] if len(outputs) == 1 else outputs

    def split(self, joined: Any, *names: str) -> tuple[Any, ...]:
        if not isinstance(joined, tuple) or len(joined) != len(names):
            raise TypeError(f"{', '.join(names)}: not what `linear` has joined")
        return joined

    def norm(self, inputs: Any, name: str) -> Any:
        module = cast("Any", self._checkpoint.model.get_submodule(name))
        if isinstance(module, nn.LayerNorm):
            return self._mb.layer_norm(
                x=inputs,
                axes=[-1],
                gamma=self._float(f"{name}.weight", module.weight),
                beta=self._float(f"{name}.bias", module.bias),
                epsilon=self._float_type(module.eps),
                name=self._label(name),
            )
        return self._rms_norm(inputs, name, module)

    def add_norm(self, inputs: Any, residual: Any, name: str) -> tuple[Any, Any]:
        total = self._mb.add(x=inputs, y=residual, name=self._label(f"{name}.sum"))
        return self.norm(total, name), total

    def add(self, left: Any, right: Any) -> Any:
        return self._mb.add(x=left, y=right, name=self._label("sum"))

    def activation(self, inputs: Any, kind: str) -> Any:
        if kind not in _ACTIVATIONS:
            raise UnsupportedError(
                f"activation {kind!r} has no Core ML operator; there are {', '.join(_ACTIVATIONS)}"
            )
        operator, options = _ACTIVATIONS[kind]
        label = self._label(f"{inputs.name}.{kind}")
        return getattr(self._mb, operator)(x=inputs, **options, name=label)

    def gated(self, joined: Any, gate: str, up: str, kind: str) -> Any:
        opened, values = self.split(joined, gate, up)
        opened = self.activation(opened, kind)
        return self._mb.mul(x=opened, y=values, name=self._label(f"{gate}.gated"))

    def norm_heads(self, joined: Any, name: str) -> Any:
        tower, (_, tokens, width) = self._spec.tower, joined.shape
        heads = [tokens, tower.heads, tower.head_dim]
        normed = self.norm(self._reshape(joined, heads, f"{joined.name}_apart"), name)
        return self._reshape(normed, [1, tokens, width], f"{joined.name}_normed")

    def attention(
        self,
        queries: Any,
        keys: Any,
        values: Any,
        window: int | None = None,
        sizes: Any = None,
    ) -> Any:
        tower = self._spec.tower
        label, tokens = queries.name, queries.shape[1]
        if window is not None:
            queries, keys, values = (
                self._split_windows(part, window) for part in (queries, keys, values)
            )
        heads = [*queries.shape[:2], tower.heads, tower.head_dim]
        query, key, value = (
            self._transpose(
                self._reshape(part, heads, f"{part.name}_split"), [0, 2, 1, 3], f"{part.name}_heads"
            )
            for part in (queries, keys, values)
        )
        if tower.rope_theta is not None:
            query, key = (self._turn_patches(part, window) for part in (query, key))
        bias = None if sizes is None else self._size_bias(sizes, label)
        attended = self._attend(query, key, value, tower.head_dim, label, bias)
        attended = self._transpose(attended, [0, 2, 1, 3], f"{label}_tokens")
        if window is not None:
            return self._join_windows(attended, window, label)
        return self._reshape(attended, [1, tokens, tower.hidden_size], f"{label}_joined")

    def _size_bias(self, sizes: Any, label: str) -> Any:
        """Log s, [1, 1, 1, tokens]: what is added to scores so that a key counts s times."""
        row = self._reshape(sizes, [1, 1, 1, sizes.shape[1]], f"{label}_sizes")
        bias = self._mb.log(x=row, name=f"{label}_size_logs")
        return self._mb.cast(x=bias, dtype=self._short, name=f"{label}_size_bias")

    def merge_tokens(
        self,
        merge: TokenMerge,
        hidden: Any,
        queries: Any,
        keys: Any,
        before: tuple[Any, Any] | None,
    ) -> tuple[Any, Any, Any]:
        label = f"merge_{merge.block}"
        wide = [
            self._mb.cast(x=value, dtype="fp32", name=f"{label}_{name}")
            for name, value in (("hidden", hidden), ("queries", queries), ("keys", keys))
        ]
        program = self._merges[merge.block]
        (function,) = program.functions.values()
        named = dict(zip(function.inputs, (*wide, *(before or ())), strict=True))
        merged, sizes, places = inline(program, named, label)
        # Sizes stay float32: float16 has whole numbers up to 2048 only.
        return self._mb.cast(x=merged, dtype=self._short, name=f"{label}_merged"), sizes, places

    def _split_windows(self, joined: Any, side: int) -> Any:
        """[1, patches, hidden] as [windows, side**2, hidden]."""
        tower = self._spec.tower
        down, across, width = tower.rows // side, tower.columns // side, tower.hidden_size
        label = f"{joined.name}_windows"
        grid = self._reshape(joined, [down, side, across, side * width], f"{label}_grid")
        grid = self._transpose(grid, [0, 2, 1, 3], f"{label}_apart")
        return self._reshape(grid, [down * across, side * side, width], label)

    def _join_windows(self, attended: Any, side: int, label: str) -> Any:
        """[windows, side**2, heads, d] as [1, patches, hidden]."""
        tower = self._spec.tower
        down, across, width = tower.rows // side, tower.columns // side, tower.hidden_size
        grid = self._reshape(attended, [down, across, side, side * width], f"{label}_windows")
        grid = self._transpose(grid, [0, 2, 1, 3], f"{label}_rows")
        return self._reshape(grid, [1, tower.patches, width], f"{label}_joined")

    def _turn_patches(self, heads: Any, window: int | None) -> Any:
        """[windows, heads, tokens, d] at the rows and columns of their patches."""
        tower = self._spec.tower
        cosine, sine = (angles[:, None] for angles in patch_angles(tower))
        sine = torch.cat([-sine[..., : tower.head_dim // 2], sine[..., tower.head_dim // 2 :]], -1)
        if window is not None:
            cosine, sine = (split_windows(part, tower, window) for part in (cosine, sine))
        kind = self._sized("whole" if window is None else f"window_{window}")
        return turn(
            self._mb,
            heads,
            self._function.constant(
                f"patch_cosine_{kind}", cosine.numpy().astype(self._float_type)
            ),
            self._function.constant(f"patch_sine_{kind}", sine.numpy().astype(self._float_type)),
        )

    def cached_attention(self, joined: Any, block: int, *names: str) -> Any:
        if self._positions is None or self._cache is None:
            raise TypeError("the decoder needs positions and a cache")
        decoder, length = self._spec.decoder, self._positions.length
        attention = decoder.attention(block)
        queries, keys, values = self.split(joined, *names)
        query = self._head_norm(self._heads(queries, decoder.heads), attention.q_norm)
        query = self._positions.rotate(block, query)
        key = self._head_norm(self._heads(keys, decoder.kv_heads), attention.k_norm)
        key = self._positions.rotate(block, key)
        value = self._heads(values, decoder.kv_heads)
        every_key, every_value = self._cache.extend(block, key, value)
        # Heads that share keys lie one below the other: nothing is repeated.
        shared = decoder.heads // decoder.kv_heads
        label = queries.name
        query = self._reshape(
            query, [decoder.kv_heads, shared * length, decoder.head_dim], f"{label}_shared"
        )
        mask = self._positions.mask(block, shared)
        attended = self._attend(
            query, every_key, every_value, decoder.head_dim, label, mask, decoder.score_softcap
        )
        attended = self._reshape(
            attended, [decoder.heads, length, decoder.head_dim], f"{label}_unshared"
        )
        attended = self._transpose(attended, [1, 0, 2], f"{label}_tokens")
        width = decoder.heads * decoder.head_dim
        return self._reshape(attended, [1, length, width], f"{label}_joined")

    def short_conv(self, joined: Any, block: int, *names: str) -> Any:
        if self._states is None:
            raise TypeError("the decoder needs states")
        conv = self._spec.decoder.convolutions[block]
        before, after, values = self.split(joined, *names)
        label = self._label(conv.kernel)
        values = self._mb.mul(x=before, y=values, name=f"{label}_gated")
        window = self._states.after_past(block, values, conv.taps - 1)
        kernel = cast("Any", self._checkpoint.model.get_submodule(conv.kernel))
        _, length, width = values.shape
        parts = []
        for tap in range(conv.taps):
            rows = self._mb.slice_by_index(
                x=window,
                begin=[0, tap, 0],
                end=[1, tap + length, width],
                name=f"{label}_{tap}_rows",
            )
            weight = self._float(f"{conv.kernel}.weight_{tap}", kernel.weight[:, 0, tap])
            parts.append(self._mb.mul(x=rows, y=weight, name=f"{label}_{tap}"))
        if kernel.bias is not None:
            parts.append(self._float(f"{conv.kernel}.bias", kernel.bias))
        total = parts[0]
        for number, part in enumerate(parts[1:], start=1):
            total = self._mb.add(x=total, y=part, name=f"{label}_sum_{number}")
        return self._mb.mul(x=after, y=total, name=self._label(conv.module))

    def head(self, normed: Any) -> Any:
        decoder = self._spec.decoder
        logits = self.linear(normed, decoder.head)
        return (
            logits if decoder.logit_softcap is None else self._capped(logits, decoder.logit_softcap)
        )

    def join_channels(self, *parts: Any) -> Any:
        return self._mb.concat(values=list(parts), axis=-1, name="features")

    def drop_first(self, inputs: Any) -> Any:
        _, count, width = inputs.shape
        return self._mb.slice_by_index(
            x=inputs, begin=[0, 1, 0], end=[1, count, width], name="drop_cls"
        )

    def last(self, inputs: Any) -> Any:
        if self._positions is None:
            raise TypeError("the decoder needs positions")
        return self._positions.last(inputs, self._label(f"{inputs.name}.last"))

    def merge_patches(self, features: Any, factor: int) -> Any:
        if factor == 1:
            return features
        tower = self._spec.tower
        rows, columns = tower.rows // factor, tower.columns // factor
        width = factor * tower.feature_size
        grid = self._reshape(features, [rows, factor, columns, width], "merge_cells")
        grid = self._transpose(grid, [0, 2, 1, 3], "merge_transpose")
        return self._reshape(grid, [1, rows * columns, factor * width], "merge")

    def average_patches(self, features: Any, factor: int) -> Any:
        tower = self._spec.tower
        rows, columns, width = tower.rows // factor, tower.columns // factor, tower.hidden_size
        grid = self._reshape(features, [rows, factor, columns, factor, width], "pool_cells")
        mean = self._mb.reduce_mean(x=grid, axes=[1, 3], keep_dims=False, name="pool_mean")
        return self._reshape(mean, [1, rows * columns, width], "pool")

    def split_channels(self, joined: Any, width: int) -> tuple[Any, ...]:
        count = joined.shape[-1] // width
        return tuple(
            self._mb.split(x=joined, num_splits=count, axis=-1, name=f"{joined.name}_channels")
        )

    def widen(self, inputs: Any, width: int) -> Any:
        return self._mb.pad(
            x=inputs,
            pad=[0, width - inputs.shape[-1]],
            mode="constant",
            constant_val=self._float_type(0),
            name=f"{inputs.name}_wide",
        )

    def take(self, features: Any, indices: Any) -> Any:
        flat = self._reshape(indices, [-1], self._label(f"{features.name}_indices"))
        return self._mb.gather(
            x=features, indices=flat, axis=1, name=self._label(f"{features.name}_taken")
        )

    def reduce(
        self, features: Any, queries: Any, keys: Any, earlier: Sequence[tuple[Any, Any]] = ()
    ) -> tuple[Any, Any]:
        if self._reducer is None:
            every = np.arange(self._spec.visual_tokens, dtype=np.int32)[None]
            return features, self._function.constant(self._sized("reducer_all"), every)
        (function,) = self._reducer.functions.values()
        values = (features, queries, keys, *chain.from_iterable(earlier))
        wide = {
            name: self._mb.cast(x=value, dtype="fp32", name=f"reducer_{name}")
            for name, value in zip(function.inputs, values, strict=True)
        }
        kept, indices = inline(self._reducer, wide, "reducer")
        return self._mb.cast(x=kept, dtype=self._short, name="reducer_kept"), indices

    def enter(self, embeds: Any) -> Any:
        """Embeddings as the decoder's first block takes them."""
        embeds = self._mb.cast(x=embeds, dtype=self._short, name="embeds_in")
        return embeds if self._positions is None else self._positions.clean(embeds)

    def _linear(self, inputs: Any, name: str) -> Any:
        module = cast("Any", self._checkpoint.layer(name))
        weight = self._weight(name)
        rows, columns = weight.shape
        missing = columns - inputs.shape[-1]
        label = self._label(name)
        if missing:
            # Weights of the padding meet zeros.
            inputs = self._mb.pad(
                x=inputs,
                pad=[0, missing],
                mode="constant",
                constant_val=self._float_type(0),
                name=f"{label}_padded",
            )
        bias = getattr(module, "bias", None)
        # A missing bias would be stored as separate zeros for each function.
        stored = (
            self._function.constant(f"no_bias_{rows}", np.zeros(rows, self._float_type))
            if bias is None
            else self._float(f"{name}.bias", bias)
        )
        return self._mb.linear(x=inputs, weight=weight, bias=stored, name=label)

    def _weight(self, name: str) -> Any:
        decoder = self._spec.decoder
        if name == decoder.head and decoder.tied_head:
            name = decoder.embedding
        package = self._function.package
        return self._function.weight(
            name,
            lambda: pack_weight(
                name,
                self._checkpoint.form(name),
                deployment=package.deployment,
                float_type=package.float_type,
            ),
        )

    def _rms_norm(self, inputs: Any, name: str, module: Any) -> Any:
        """RMSNorm by the layer norm of (x, -x): its mean is 0, its variance the mean square."""
        label, width = self._label(name), inputs.shape[-1]
        negative = self._mb.mul(x=inputs, y=self._float_type(-1), name=f"{label}_negative")
        both = self._mb.concat(values=[inputs, negative], axis=-1, name=f"{label}_both")
        weight = module.weight.detach().to(torch.float32)
        normed = self._mb.layer_norm(
            x=both,
            axes=[-1],
            gamma=self._float(f"{name}.weight_twice", torch.cat([weight, weight])),
            epsilon=self._float_type(module.eps),
            name=f"{label}_wide",
        )
        return self._first_columns(normed, width, label)

    def _head_norm(self, heads: Any, name: str | None) -> Any:
        """[heads, length, d] after their norm, where they have one."""
        return heads if name is None else self.norm(heads, name)

    def _heads(self, joined: Any, heads: int) -> Any:
        """[1, length, heads * d] as [heads, length, d]."""
        length, width = joined.shape[1], joined.shape[2] // heads
        split = self._reshape(joined, [length, heads, width], f"{joined.name}_split")
        return self._transpose(split, [1, 0, 2], f"{joined.name}_heads")

    def _capped(self, values: Any, softcap: float) -> Any:
        """Values v as softcap tanh(v / softcap)."""
        label = values.name
        share = self._mb.mul(x=values, y=self._float_type(1 / softcap), name=f"{label}_share")
        bounded = self._mb.tanh(x=share, name=f"{label}_bounded")
        return self._mb.mul(x=bounded, y=self._float_type(softcap), name=f"{label}_capped")

    def _attend(
        self,
        query: Any,
        key: Any,
        value: Any,
        width: int,
        label: str,
        mask: Any = None,
        softcap: float | None = None,
    ) -> Any:
        scale = self._float_type(width**-0.5)
        query = self._mb.mul(x=query, y=scale, name=f"{label}_scaled")
        scores = self._mb.matmul(x=query, y=key, transpose_y=True, name=f"{label}_scores")
        if softcap is not None:
            scores = self._capped(scores, softcap)
        if mask is not None:
            scores = self._mb.add(x=scores, y=mask, name=f"{label}_masked")
        weights = self._mb.softmax(x=scores, axis=-1, name=f"{label}_weights")
        return self._mb.matmul(x=weights, y=value, name=f"{label}_attended")

    def _first_columns(self, values: Any, width: int, label: str) -> Any:
        if values.shape[-1] == width:
            return values
        return self._mb.slice_by_index(
            x=values, begin=[0, 0, 0], end=[*values.shape[:2], width], name=label
        )

    def _reshape(self, values: Any, shape: list[int], name: str) -> Any:
        return self._mb.reshape(x=values, shape=shape, name=name)

    def _transpose(self, values: Any, order: list[int], name: str) -> Any:
        return self._mb.transpose(x=values, perm=order, name=name)

    def _float(self, name: str, values: Any) -> Any:
        return self._function.constant(name, narrow_float(name, values, self._float_type))

    def _label(self, name: str) -> str:
        """The name as the format allows it, numbered if it was given before."""
        label = identifier(name)
        count = self._names.get(label, 0)
        self._names[label] = count + 1
        return f"{label}_again_{count}" if count else label
