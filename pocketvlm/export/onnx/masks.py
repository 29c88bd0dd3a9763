"""Masks of the decoder's attention in ONNX, where rows see others than all of the past."""

from __future__ import annotations

import numpy as np

from pocketvlm.export.onnx.writer import GraphWriter
from pocketvlm.models.decoder import DecoderSpec

__all__ = ["Masks"]

_HIDDEN = -1e9  # far below any score, and finite: a row with nothing to see would be NaN


class Masks:
    """What is added to attention scores: one value of the graph for each kind of block.

    Args:
        graph: Where nodes go; it has the inputs `position_ids` [axes, length], `past_length` [1]
            and, where rows see each other, `mutual` [1, length].
        decoder: The decoder.
    """

    def __init__(self, graph: GraphWriter, decoder: DecoderSpec) -> None:
        self._graph = graph
        self._decoder = decoder
        self._shared: dict[str, str] = {}

    def of(self, block: int) -> str | None:
        """What is added to the scores of a block, [1, 1, length, total]; `None` for nothing.

        It is 0 where a row may look, as `graph.visibility.visible_rows` says.
        """
        decoder, graph = self._decoder, self._graph
        if not decoder.has_masks:
            return None
        sliding = decoder.sliding_of(block)
        window = None if sliding is None else sliding.window
        name = "mask" if window is None else "mask.sliding"
        if name not in self._shared:
            distance = self._distances()
            zero = graph.constant("zero", np.array(0, dtype=np.int64))
            visible = graph.node("GreaterOrEqual", [distance, zero], name=f"{name}.past")
            if window is not None:
                limit = graph.constant(f"{name}.window", np.array(window, dtype=np.int64))
                near = graph.node("Less", [distance, limit], name=f"{name}.near")
                visible = graph.node("And", [visible, near], name=f"{name}.near_past")
            if decoder.mutual_rows is not None:
                visible = graph.node("Or", [visible, self._rows_together()], name=f"{name}.visible")
            shown = graph.constant("mask.shown", np.array(0.0, dtype=np.float32))
            hidden = graph.constant("mask.hidden", np.array(_HIDDEN, dtype=np.float32))
            added = graph.node("Where", [visible, shown, hidden], name=f"{name}.added")
            axes = graph.constant("mask.axes", np.array([0, 1], dtype=np.int64))
            self._shared[name] = graph.node("Unsqueeze", [added, axes], name=name)
        return self._shared[name]

    def _distances(self) -> str:
        """How many rows each slot lies after each row, int64 [length, total]."""
        if "distance" not in self._shared:
            graph = self._graph
            length = graph.node("Shape", ["position_ids"], name="mask.length", start=-1)
            scalar = graph.constant("scalar", np.zeros(0, dtype=np.int64))
            past = graph.node("Reshape", ["past_length", scalar], name="mask.past_length")
            rows = graph.node("Reshape", [length, scalar], name="mask.rows")
            total = graph.node("Add", [past, rows], name="mask.total")
            zero = graph.constant("zero", np.array(0, dtype=np.int64))
            one = graph.constant("step", np.array(1, dtype=np.int64))
            slots = graph.node("Range", [past, total, one], name="mask.slots")
            every = graph.node("Range", [zero, total, one], name="mask.every")
            axis = graph.constant("mask.column", np.array([1], dtype=np.int64))
            column = graph.node("Unsqueeze", [slots, axis], name="mask.slot_column")
            self._shared["distance"] = graph.node("Sub", [column, every], name="mask.distance")
        return self._shared["distance"]

    def _rows_together(self) -> str:
        """Which slots have the number of each row in `mutual`, bool [length, total]."""
        if "together" not in self._shared:
            graph = self._graph
            flat = graph.constant("flat", np.array([-1], dtype=np.int64))
            numbers = graph.node("Reshape", ["mutual", flat], name="mask.numbers")
            none = graph.constant("none", np.array([0], dtype=np.int64))
            pads = graph.node("Concat", ["past_length", none], name="mask.pads", axis=0)
            alone = graph.constant("mask.alone", np.array(-1, dtype=np.int64))
            by_slot = graph.node("Pad", [numbers, pads, alone], name="mask.by_slot")
            axis = graph.constant("mask.column", np.array([1], dtype=np.int64))
            column = graph.node("Unsqueeze", [numbers, axis], name="mask.number_column")
            same = graph.node("Equal", [column, by_slot], name="mask.same")
            zero = graph.constant("zero", np.array(0, dtype=np.int64))
            counts = graph.node("GreaterOrEqual", [column, zero], name="mask.counts")
            self._shared["together"] = graph.node("And", [same, counts], name="mask.together")
        return self._shared["together"]
