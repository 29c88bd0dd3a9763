"""The decoder's cache in Core ML: kept by the runtime (iOS 18), or passed in and out (iOS 17).

Either way there are two tensors, float16 [layers, kv_heads, capacity, width], of the layers that
have attention. The width is the head's, rounded up to a multiple of 32: states of other widths
fail on the Neural Engine. States hold nothing wider than float16, so where graphs compute in
float32, a row is held twice as wide: the nearest float16 of every number, and then what that
leaves, scaled so that it has as many digits. Together they have 22 bits of a number, float32 24.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from pocketvlm.bundle import TensorSignature
from pocketvlm.export.coreml.writer import FunctionWriter
from pocketvlm.models.decoder import DecoderSpec
from pocketvlm.models.spec import ModelSpec

__all__ = [
    "CACHE_DTYPE",
    "DecoderCache",
    "PassedCache",
    "StatefulCache",
    "cache_signatures",
    "round_up",
]

CACHE_DTYPE = "float16"
_NAMES = ("key_cache", "value_cache")
_PASSED = ("key_cache_out", "value_cache_out")
_MULTIPLE = 32
_REST_SCALE = 2.0**11
"""A float16 is off by 2**-11 of a number at most: what it leaves is at most as large, scaled."""


def round_up(count: int, multiple: int = _MULTIPLE) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple


def cache_signatures(
    spec: ModelSpec,
    capacity: int,
    float_type: type[np.floating[Any]],
    *,
    is_output: bool = False,
) -> tuple[TensorSignature, ...]:
    """Keys and values: states of iOS 18, inputs or outputs of iOS 17.

    Args:
        spec: The model.
        capacity: Rows of the cache.
        float_type: What the graphs compute in.
        is_output: Whether these are the extended ones.
    """
    decoder = spec.decoder
    width = _held_width(decoder, float_type)
    shape = (len(decoder.attention_blocks), decoder.kv_heads, capacity, width)
    return tuple(
        TensorSignature(name=name, dtype=CACHE_DTYPE, shape=shape)
        for name in (_PASSED if is_output else _NAMES)
    )


class DecoderCache(Protocol):
    """The cache while one function is written; new rows follow the past."""

    def extend(self, block: int, keys: Any, values: Any) -> tuple[Any, Any]:
        """Writes new rows [kv_heads, length, head_dim], returns all [kv_heads, capacity, same]."""
        ...


class StatefulCache:
    """Two states of the runtime.

    Every block reads back what it has written: that is how the runtime knows that it may write in
    place.

    Args:
        function: What is written; it has the states.
        spec: The model.
        capacity: Rows of the cache.
        length: New rows of a call.
    """

    def __init__(
        self, function: FunctionWriter, spec: ModelSpec, capacity: int, length: int
    ) -> None:
        from coremltools.converters.mil.mil import Builder

        self._function = function
        self._decoder = spec.decoder
        self._capacity = capacity
        self._start = function.inputs["past_length"]
        self._end = Builder.add(x=self._start, y=np.array([length], np.int32), name="cache_end")
        self._current = {
            name: Builder.read_state(input=function.inputs[name], name=f"{name}_before")
            for name in _NAMES
        }

    def extend(self, block: int, keys: Any, values: Any) -> tuple[Any, Any]:
        """Writes new rows of a block, returns all of its rows."""
        from coremltools.converters.mil.mil import Builder

        heads = self._decoder.kv_heads
        width = _held_width(self._decoder, self._function.package.float_type)
        layer = self._decoder.attention_blocks.index(block)
        bounds = [
            Builder.concat(
                values=[
                    np.array(front, np.int32),
                    place,
                    np.array(back, np.int32),
                ],
                axis=0,
                name=f"cache_{block}_{label}",
            )
            for label, front, place, back in (
                ("begin", [layer, 0], self._start, [0]),
                ("end", [layer + 1, heads], self._end, [width]),
            )
        ]
        rows = []
        for name, new in zip(_NAMES, (keys, values), strict=True):
            label = f"{name}_{block}"
            update = Builder.expand_dims(
                x=_stored(self._function, new, label), axes=[0], name=f"{label}_new"
            )
            written = Builder.slice_update(
                x=self._current[name],
                update=update,
                begin=bounds[0],
                end=bounds[1],
                name=f"{label}_written",
            )
            self._current[name] = Builder.coreml_update_state(
                state=self._function.inputs[name], value=written, name=label
            )
            rows.append(
                _computed(
                    self._function, self._current[name], block, self._capacity, self._decoder, label
                )
            )
        return rows[0], rows[1]


class PassedCache:
    """Two inputs and two outputs; new rows get into place by a product with ones and zeros.

    iOS 17 has no operator that writes a slice whose place is computed.

    Args:
        function: What is written; it has the inputs.
        spec: The model.
        capacity: Rows of the cache.
        slots: int32 [length]: where the new rows of a call go.
    """

    def __init__(
        self, function: FunctionWriter, spec: ModelSpec, capacity: int, slots: Any
    ) -> None:
        from coremltools.converters.mil.mil import Builder

        self._function = function
        self._decoder = spec.decoder
        self._capacity = capacity
        self._new: dict[str, list[Any]] = {name: [] for name in _NAMES}
        every = np.arange(capacity, dtype=np.int32)[None, :, None]
        place = Builder.expand_dims(x=slots, axes=[0, 1], name="slots_wide")
        is_here = Builder.equal(x=every, y=place, name="slots_equal")
        kind = _short(function.package.float_type)
        self._places = Builder.cast(x=is_here, dtype=kind, name="slots_one_hot")
        taken = Builder.reduce_sum(x=self._places, axes=[2], keep_dims=True, name="slots_taken")
        one = function.package.float_type(1)
        self._kept = Builder.sub(x=one, y=taken, name="slots_kept")

    def extend(self, block: int, keys: Any, values: Any) -> tuple[Any, Any]:
        """Writes new rows of a block, returns all of its rows."""
        from coremltools.converters.mil.mil import Builder

        rows = []
        for name, new in zip(_NAMES, (keys, values), strict=True):
            label = f"{name}_{block}"
            before = _computed(
                self._function,
                self._function.inputs[name],
                block,
                self._capacity,
                self._decoder,
                f"{label}_before",
            )
            placed = Builder.matmul(x=self._places, y=new, name=f"{label}_placed")
            kept = Builder.mul(x=before, y=self._kept, name=f"{label}_kept")
            row = Builder.add(x=kept, y=placed, name=label)
            self._new[name].append(_stored(self._function, row, f"{label}_stored"))
            rows.append(row)
        return rows[0], rows[1]

    def finish(self) -> None:
        """Makes the extended cache an output of the function."""
        from coremltools.converters.mil.mil import Builder

        for name, output in zip(_NAMES, _PASSED, strict=True):
            joined = Builder.stack(values=self._new[name], axis=0, name=f"{name}_joined")
            self._function.output(joined, output, CACHE_DTYPE)


def _held_width(decoder: DecoderSpec, float_type: type[np.floating[Any]]) -> int:
    """Numbers of a row of the cache."""
    return round_up(decoder.head_dim) * (1 if float_type is np.float16 else 2)


def _stored(function: FunctionWriter, rows: Any, label: str) -> Any:
    """Rows [..., head_dim] as the cache holds them, each part filled up with zeros."""
    from coremltools.converters.mil.mil import Builder

    parts = {label: Builder.cast(x=rows, dtype="fp16", name=f"{label}_float16")}
    if function.package.float_type is not np.float16:
        nearest = Builder.cast(x=parts[label], dtype="fp32", name=f"{label}_nearest")
        rest = Builder.sub(x=rows, y=nearest, name=f"{label}_difference")
        rest = Builder.mul(x=rest, y=np.float32(_REST_SCALE), name=f"{label}_scaled")
        parts[f"{label}_rest"] = Builder.cast(x=rest, dtype="fp16", name=f"{label}_rest_float16")
    missing = round_up(rows.shape[-1]) - rows.shape[-1]
    if missing:
        parts = {
            name: Builder.pad(
                x=part,
                pad=[0, missing],
                mode="constant",
                constant_val=np.float16(0),
                name=f"{name}_padded",
            )
            for name, part in parts.items()
        }
    if len(parts) == 1:
        return parts[label]
    return Builder.concat(values=list(parts.values()), axis=-1, name=f"{label}_parts")


def _computed(
    function: FunctionWriter,
    cache: Any,
    block: int,
    capacity: int,
    decoder: DecoderSpec,
    label: str,
) -> Any:
    """All rows of a block as graphs compute with them, [kv_heads, capacity, head_dim]."""
    from coremltools.converters.mil.mil import Builder

    layer = decoder.attention_blocks.index(block)

    def part(start: int, name: str) -> Any:
        return Builder.slice_by_index(
            x=cache,
            begin=[layer, 0, 0, start],
            end=[layer + 1, decoder.kv_heads, capacity, start + decoder.head_dim],
            squeeze_mask=[True, False, False, False],
            name=f"{label}_{name}",
        )

    rows = part(0, "rows")
    if function.package.float_type is np.float16:
        return rows
    wide = Builder.cast(x=rows, dtype="fp32", name=f"{label}_wide")
    rest = Builder.cast(
        x=part(round_up(decoder.head_dim), "rest_rows"), dtype="fp32", name=f"{label}_rest_wide"
    )
    rest = Builder.mul(x=rest, y=np.float32(1 / _REST_SCALE), name=f"{label}_rest_unscaled")
    return Builder.add(x=wide, y=rest, name=f"{label}_whole")


def _short(float_type: type[np.floating]) -> str:
    return "fp16" if float_type is np.float16 else "fp32"
