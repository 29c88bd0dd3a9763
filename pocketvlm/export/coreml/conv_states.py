"""States of short convolutions in Core ML: one tensor that goes in and out of every call.

It is small, and an app that cuts a conversation back keeps copies of it, which is why it is not a
state of the runtime.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pocketvlm.bundle import TensorSignature
from pocketvlm.export.coreml.writer import FunctionWriter
from pocketvlm.models.spec import ModelSpec

__all__ = ["ConvStates", "conv_state_signatures"]

_NAME, _OUTPUT = "conv_state", "conv_state_out"
_DTYPE = "float32"


def conv_state_signatures(
    spec: ModelSpec, *, is_output: bool = False
) -> tuple[TensorSignature, ...]:
    """The states, [convolutions, taps - 1, width]; nothing where a decoder has none."""
    decoder = spec.decoder
    convolutions = tuple(decoder.convolutions.values())
    if not convolutions:
        return ()
    shape = (len(convolutions), convolutions[0].taps - 1, decoder.hidden_size)
    return (TensorSignature(name=_OUTPUT if is_output else _NAME, dtype=_DTYPE, shape=shape),)


class ConvStates:
    """The states while one function is written.

    Args:
        function: What is written; it has the input of `conv_state_signatures`, and `length` [1]
            where not every row is real.
        spec: The model.
    """

    def __init__(self, function: FunctionWriter, spec: ModelSpec) -> None:
        from coremltools.converters.mil.mil import Builder

        self._mb = Builder
        self._function = function
        self._layers = {block: layer for layer, block in enumerate(spec.decoder.convolutions)}
        self._new: list[Any] = []

    def after_past(self, block: int, values: Any, rows: int) -> Any:
        """Extends the state of a block; returns it with values [1, length, width] after it.

        The next state ends with the last real row: what fills a call up never enters it.
        """
        label, layer = f"conv_{block}", self._layers[block]
        _, length, width = values.shape
        held = self._function.inputs[_NAME]
        before = self._mb.slice_by_index(
            x=held,
            begin=[layer, 0, 0],
            end=[layer + 1, rows, width],
            name=f"{label}_before",
        )
        kind = "fp16" if self._function.package.float_type is np.float16 else "fp32"
        before = self._mb.cast(x=before, dtype=kind, name=f"{label}_past")
        window = self._mb.concat(values=[before, values], axis=1, name=f"{label}_window")
        count = self._function.inputs.get("length", np.array([length], np.int32))
        places = self._mb.add(x=count, y=np.arange(rows, dtype=np.int32), name=f"{label}_places")
        kept = self._mb.gather(x=window, indices=places, axis=1, name=f"{label}_kept")
        self._new.append(self._mb.cast(x=kept, dtype="fp32", name=f"{label}_state"))
        return window

    def finish(self) -> None:
        """Makes the extended states an output of the function."""
        if self._new:
            joined = self._mb.concat(values=self._new, axis=0, name="conv_states")
            self._function.output(joined, _OUTPUT, _DTYPE)
