"""Rows of one call of the decoder: rotary positions, what they may see, which of them are real.

A prompt is processed in chunks of a fixed number of rows; the last chunk is filled up. Rows that
are not tokens come last, write cache rows that the next call overwrites, and are seen by no other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pocketvlm.export.coreml.writer import FunctionWriter
from pocketvlm.models.decoder import RopeSpec
from pocketvlm.models.spec import ModelSpec

__all__ = ["TABLE_ROWS", "DecoderPositions", "turn"]

_MASKED = -1e4  # far below any score, far above what float16 ends at
TABLE_ROWS = 4096


class DecoderPositions:
    """Positions, mask and row count of a call.

    Args:
        function: What is written; it has the inputs `position_ids` [axes, length], `past_length`
            [1], `length` [1] where not every row is real, and `mutual` [1, length] where rows may
            see each other.
        spec: The model.
        capacity: Rows of the cache.
        length: Rows of a call.

    Attributes:
        length: Rows of a call.
        slots: int32 [length]: the cache row of each.
    """

    def __init__(
        self, function: FunctionWriter, spec: ModelSpec, capacity: int, length: int
    ) -> None:
        from coremltools.converters.mil.mil import Builder

        self._mb = Builder
        self._function = function
        self._spec = spec
        self.length = length
        self._short = "fp16" if function.package.float_type is np.float16 else "fp32"
        self._count = function.inputs.get("length")
        self._rows = np.arange(length, dtype=np.int32)
        self.slots = Builder.add(x=function.inputs["past_length"], y=self._rows, name="slots")
        self._capacity = capacity
        self._masks: dict[tuple[int | None, int], Any] = {}
        self._hidden: dict[int | None, Any] = {}
        self._hidden[None] = self._hide(None)
        rope = spec.decoder.rope
        self._angles = {rope: self._rotary(rope)}

    def rotate(self, block: int, heads: Any) -> Any:
        """Rotary embedding of [heads, length, d]."""
        rope = self._spec.decoder.rope_of(block)
        if rope not in self._angles:
            self._angles[rope] = self._rotary(rope)
        return turn(self._mb, heads, *self._angles[rope])

    def mask(self, block: int, shared: int) -> Any:
        """What is added to scores [heads, shared * length, capacity] of a block."""
        sliding = self._spec.decoder.sliding_of(block)
        window = None if sliding is None else sliding.window
        if (window, shared) not in self._masks:
            if window not in self._hidden:
                self._hidden[window] = self._hide(window)
            mask = self._hidden[window]
            if shared > 1:
                mask = self._mb.tile(x=mask, reps=[shared, 1], name=f"{mask.name}_{shared}")
            self._masks[window, shared] = mask
        return self._masks[window, shared]

    def clean(self, embeds: Any) -> Any:
        """Ones instead of rows that are not tokens, so that nothing there reaches a norm."""
        if self._count is None:
            return embeds
        is_real = self._mb.less(x=self._rows, y=self._count, name="is_real")
        is_real = self._mb.expand_dims(x=is_real, axes=[0, 2], name="is_real_wide")
        one = self._function.package.float_type(1)
        return self._mb.select(cond=is_real, a=embeds, b=one, name="embeds_real")

    def last(self, values: Any, label: str) -> Any:
        """The last real row of [1, length, width]."""
        if self._count is None:
            return values
        row = self._mb.sub(x=self._count, y=np.array([1], np.int32), name=f"{label}_row")
        return self._mb.gather(x=values, indices=row, axis=1, name=label)

    def _hide(self, window: int | None) -> Any:
        """[length, capacity]: 0 where a row may look, a large negative number elsewhere.

        What a row may see is told by slots, not by positions, which may have gaps
        (`graph.visibility.visible_rows`).
        """
        label = "" if window is None else "sliding_"
        rows = np.arange(self._capacity, dtype=np.int32)[None]
        every = self._function.constant("cache_rows", rows)
        slots = self._mb.expand_dims(x=self.slots, axes=[1], name=f"{label}slots_column")
        hidden = self._mb.greater(x=every, y=slots, name=f"{label}is_later")
        if window is not None:
            distance = self._mb.sub(x=slots, y=every, name=f"{label}distance")
            is_far = self._mb.greater_equal(x=distance, y=np.int32(window), name=f"{label}is_far")
            hidden = self._mb.logical_or(x=hidden, y=is_far, name=f"{label}outside")
        if "mutual" in self._function.inputs:
            apart = self._mb.logical_not(x=self._together(label, every), name=f"{label}apart")
            hidden = self._mb.logical_and(x=hidden, y=apart, name=f"{label}hidden")
        hidden = self._mb.cast(
            x=hidden,
            dtype=self._short,
            name=f"{label}is_hidden_float" if self._spec.decoder.has_masks else "is_later_float",
        )
        masked = self._function.package.float_type(_MASKED)
        return self._mb.mul(x=hidden, y=masked, name=f"{label}mask")

    def _together(self, label: str, every: Any) -> Any:
        """Which cache rows have the number of each row, bool [length, capacity]."""
        numbers = self._mb.squeeze(
            x=self._function.inputs["mutual"], axes=[0], name=f"{label}numbers"
        )
        column = self._mb.expand_dims(x=numbers, axes=[1], name=f"{label}number_column")
        past = self._function.inputs["past_length"]
        place = self._mb.sub(x=every, y=past, name=f"{label}place")
        inside = self._mb.maximum(x=place, y=np.int32(0), name=f"{label}not_before")
        inside = self._mb.minimum(x=inside, y=np.int32(self.length - 1), name=f"{label}inside")
        found = self._mb.gather(x=numbers, indices=inside, axis=0, name=f"{label}by_slot")
        same = self._mb.equal(x=column, y=found, name=f"{label}same")
        is_real = self._mb.equal(x=inside, y=place, name=f"{label}is_new")
        same = self._mb.logical_and(x=same, y=is_real, name=f"{label}same_new")
        counts = self._mb.greater_equal(x=column, y=np.int32(0), name=f"{label}counts")
        return self._mb.logical_and(x=same, y=counts, name=f"{label}together")

    def _rotary(self, rope: RopeSpec) -> tuple[Any, Any]:
        """Cosines and sines of the rows, [length, d]; the first half of the sines is negated."""
        decoder = self._spec.decoder
        label = "" if rope == decoder.rope else "sliding_"
        rows = min(decoder.max_positions, max(TABLE_ROWS, self._capacity))
        exponents = np.arange(0, rope.width, 2, dtype=np.float32) / rope.width
        frequencies = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
        frequencies = frequencies / np.float32(rope.factor)
        angles = np.arange(rows, dtype=np.float32)[:, None] * frequencies[None]
        positions = self._function.inputs["position_ids"]
        if rope.axes == 1:
            positions = self._mb.squeeze(x=positions, axes=[0], name=f"{label}positions")
        halves = []
        for name, table in (("cosine", np.cos(angles)), ("sine", np.sin(angles))):
            stored = self._function.constant(
                f"{label}rotary_{name}", table.astype(self._function.package.float_type)
            )
            half = self._mb.gather(x=stored, indices=positions, axis=0, name=f"{label}{name}_half")
            halves.append(half if rope.axes == 1 else self._of_axes(half, name))
        cosine, sine = halves
        negated = self._mb.mul(
            x=sine, y=self._function.package.float_type(-1), name=f"{label}sine_negated"
        )
        return (
            self._mb.concat(values=[cosine, cosine], axis=-1, name=f"{label}cosine"),
            self._mb.concat(values=[negated, sine], axis=-1, name=f"{label}sine"),
        )

    def _of_axes(self, half: Any, name: str) -> Any:
        """[axes, length, pairs] as [length, pairs], each pair from the axis that turns it."""
        rope = self._spec.decoder.rope
        axes = np.array(rope.pair_axes) == np.arange(rope.axes)[:, None]
        own = self._function.constant(
            "rotary_axes", axes[:, None].astype(self._function.package.float_type)
        )
        half = self._mb.mul(x=half, y=own, name=f"{name}_own")
        return self._mb.reduce_sum(x=half, axes=[0], name=f"{name}_of_axes")


def turn(builder: Any, heads: Any, cosine: Any, sine: Any) -> Any:
    """Rotary embedding of [..., d] (arXiv 2104.09864, eq. 34); half of the sines is negated."""
    label = heads.name
    left, right = builder.split(x=heads, num_splits=2, axis=-1, name=f"{label}_halves")
    swapped = builder.concat(values=[right, left], axis=-1, name=f"{label}_swapped")
    straight = builder.mul(x=heads, y=cosine, name=f"{label}_cosine")
    turned = builder.mul(x=swapped, y=sine, name=f"{label}_sine")
    return builder.add(x=straight, y=turned, name=f"{label}_rotated")
