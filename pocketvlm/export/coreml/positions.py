"""Rows of one call of the decoder: rotary positions, what they may see, which of them are real.

A prompt is processed in chunks of a fixed number of rows; the last chunk is filled up. Rows that
are not tokens come last, write cache rows that the next call overwrites, and are seen by no other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pocketvlm.export.coreml.writer import FunctionWriter
from pocketvlm.models.spec import ModelSpec

__all__ = ["TABLE_ROWS", "DecoderPositions", "turn"]

_MASKED = -1e4  # far below any score, far above what float16 ends at
TABLE_ROWS = 4096


class DecoderPositions:
    """Positions, mask and row count of a call.

    Args:
        function: What is written; it has the inputs `position_ids` [axes, length], `past_length`
            [1], and `length` [1] where not every row is real.
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
        self._masks: dict[int, Any] = {}
        self._hidden = self._hide(capacity)
        self._cosine, self._sine = self._rotary(capacity)

    def rotate(self, heads: Any) -> Any:
        """Rotary embedding of [heads, length, d]."""
        return turn(self._mb, heads, self._cosine, self._sine)

    def mask(self, shared: int) -> Any:
        """What is added to scores [heads, shared * length, capacity]."""
        if shared not in self._masks:
            self._masks[shared] = (
                self._hidden
                if shared == 1
                else self._mb.tile(x=self._hidden, reps=[shared, 1], name=f"mask_{shared}")
            )
        return self._masks[shared]

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

    def _hide(self, capacity: int) -> Any:
        """[length, capacity]: 0 where a row may look, a large negative number elsewhere.

        What a row may see is told by slots, not by positions, which may have gaps.
        """
        every = self._function.constant("cache_rows", np.arange(capacity, dtype=np.int32)[None])
        slots = self._mb.expand_dims(x=self.slots, axes=[1], name="slots_column")
        is_later = self._mb.greater(x=every, y=slots, name="is_later")
        is_later = self._mb.cast(x=is_later, dtype=self._short, name="is_later_float")
        masked = self._function.package.float_type(_MASKED)
        return self._mb.mul(x=is_later, y=masked, name="mask")

    def _rotary(self, capacity: int) -> tuple[Any, Any]:
        """Cosines and sines of the rows, [length, d]; the first half of the sines is negated."""
        decoder = self._spec.decoder
        rows = min(decoder.max_positions, max(TABLE_ROWS, capacity))
        exponents = np.arange(0, decoder.head_dim, 2, dtype=np.float32) / decoder.head_dim
        frequencies = (1.0 / np.float32(decoder.rope.theta) ** exponents).astype(np.float32)
        angles = np.arange(rows, dtype=np.float32)[:, None] * frequencies[None]
        positions = self._function.inputs["position_ids"]
        if decoder.rope.axes == 1:
            positions = self._mb.squeeze(x=positions, axes=[0], name="positions")
        halves = []
        for name, table in (("cosine", np.cos(angles)), ("sine", np.sin(angles))):
            stored = self._function.constant(
                f"rotary_{name}", table.astype(self._function.package.float_type)
            )
            half = self._mb.gather(x=stored, indices=positions, axis=0, name=f"{name}_half")
            halves.append(half if decoder.rope.axes == 1 else self._of_axes(half, name))
        cosine, sine = halves
        negated = self._mb.mul(x=sine, y=self._function.package.float_type(-1), name="sine_negated")
        return (
            self._mb.concat(values=[cosine, cosine], axis=-1, name="cosine"),
            self._mb.concat(values=[negated, sine], axis=-1, name="sine"),
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
