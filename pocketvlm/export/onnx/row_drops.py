"""Where visual rows leave the ONNX decoder: `RowDrops` over names of values.

One graph serves prefill and generation, so which rows are left is computed in it: the rows of text,
and of the others as many as the schedule says. They are ranked by what the call's last row pays
them, from the block's own queries and keys, in a branch that is taken where a call has visual rows:
a step of generation costs a few nodes.
"""

from __future__ import annotations

import numpy as np
import onnx

from pocketvlm.bundle import VisualSchedule
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.export.onnx.ops import OnnxOps
from pocketvlm.export.onnx.writer import GraphWriter

__all__ = ["OnnxRowDrops"]

_END = np.iinfo(np.int64).max
_TEXT_BONUS = 2.0  # more than any share of attention


class OnnxRowDrops:
    """Rows that leave a decoder under construction.

    Args:
        ops: The decoder's operators.
        graph: Where nodes go; it has the inputs `text_rows` and `past_stage_lengths`.
        checkpoint: The model.
        schedule: Its schedule.
    """

    def __init__(
        self, ops: OnnxOps, graph: GraphWriter, checkpoint: Checkpoint, schedule: VisualSchedule
    ) -> None:
        self._ops = ops
        self._graph = graph
        self._decoder = checkpoint.spec.decoder
        self._grid = checkpoint.cache_grid
        self._schedule = schedule
        self._is_text = ""  # 1 for rows of text and 0 for others, float32 [rows] of a stage
        self._visual = ""  # visual rows of the call, [1]
        self._has_visual = ""

    def before_attention(self, block: int, joined: str, hidden: str) -> tuple[str, str]:
        """As `RowDrops.before_attention`."""
        drop = self._schedule.drop_in(block, after_attention=False)
        if drop is None:
            return joined, hidden
        rows = self._rows_left(drop, block, joined)
        return self._take(joined, rows), self._take(hidden, rows)

    def after_attention(self, block: int, joined: str, mixed: str, hidden: str) -> tuple[str, str]:
        """As `RowDrops.after_attention`."""
        drop = self._schedule.drop_in(block, after_attention=True)
        if drop is None:
            return mixed, hidden
        rows = self._rows_left(drop, block, joined)
        return self._take(mixed, rows), self._take(hidden, rows)

    def _take(self, states: str, rows: str) -> str:
        return self._graph.node("Gather", [states, rows], name=f"{states}.left", axis=1)

    def _rows_left(self, drop: int, block: int, joined: str) -> str:
        """Rows that a drop leaves, by their indices [left] among those of the stage before."""
        graph = self._graph
        if drop == 0 and self._schedule.is_ranked:
            self._tell_rows_apart()
        name = f"drop{drop}"
        if self._schedule.drops[drop].keep:
            length = graph.node("Shape", [joined], name=f"{name}.length", start=1, end=2)
            # What both branches read must not be made inside one of them.
            self._ops.rotary_rows(drop, self._decoder.rope_of(block))
            for stage in (drop, self._schedule.stage_of(block)):
                self._ops.past_of(stage)
            rows = graph.either(
                self._has_visual,
                lambda: self._most_attended(drop, block, joined, length),
                lambda: self._every(length, name),
                name=f"{name}.rows",
            )
        elif drop == 0:
            rows = "text_rows"
        else:
            places = graph.node("NonZero", [self._is_text], name=f"{name}.text")
            rows = self._reshape(places, [-1], f"{name}.rows")
        self._ops.enter_stage(rows)
        if self._is_text:
            self._is_text = graph.node("Gather", [self._is_text, rows], name=f"{name}.is_text")
        return rows

    def _tell_rows_apart(self) -> None:
        """Which rows of the call are text, and how many are not."""
        graph = self._graph
        length = graph.node("Shape", ["position_ids"], name="rows.length", start=1)
        text = graph.node("Shape", ["text_rows"], name="rows.text")
        self._visual = graph.node("Sub", [length, text], name="rows.visual")
        none = graph.constant("none", np.array([0], dtype=np.int64))
        self._has_visual = graph.node("Greater", [self._visual, none], name="rows.has_visual")
        filled = [
            graph.node("ConstantOfShape", [shape], name=name, value=_number(value))
            for shape, name, value in ((length, "rows.zeros", 0.0), (text, "rows.ones", 1.0))
        ]
        self._is_text = graph.node(
            "ScatterElements", [filled[0], "text_rows", filled[1]], name="rows.is_text"
        )

    def _every(self, length: str, name: str) -> str:
        """All rows."""
        graph = self._graph
        ones = graph.node("ConstantOfShape", [length], name=f"{name}.ones", value=_number(1.0))
        places = graph.node("NonZero", [ones], name=f"{name}.places")
        return self._reshape(places, [-1], f"{name}.every")

    def _most_attended(self, drop: int, block: int, joined: str, length: str) -> str:
        """Rows of text, and of the others those that the last row pays the most, ascending."""
        graph, name = self._graph, f"drop{drop}"
        keep, tokens = self._schedule.drops[drop].keep, self._schedule.tokens
        count = self._visual
        for operator, number in (("Mul", keep), ("Add", tokens - 1), ("Div", tokens)):
            operand = graph.constant(f"whole.{number}", np.array([number], dtype=np.int64))
            count = graph.node(operator, [count, operand], name=f"{name}.visual")
        text = graph.node("Shape", ["text_rows"], name=f"{name}.text")
        count = graph.node("Add", [count, text], name=f"{name}.count")
        scores = self._attention_of_last(drop, block, joined, length)
        bonus = self._times(self._is_text, _TEXT_BONUS, f"{name}.bonus")
        order = graph.node("Add", [scores, bonus], name=f"{name}.order")
        _, best = graph.nodes(
            "TopK", [order, count], [f"{name}.best_scores", f"{name}.best"], name=f"{name}.best"
        )
        ascending, _ = graph.nodes(
            "TopK",
            [best, count],
            [f"{name}.ascending", f"{name}.ascending_places"],
            name=f"{name}.ascending",
            largest=0,
        )
        return ascending

    def _attention_of_last(self, drop: int, block: int, joined: str, length: str) -> str:
        """What the last row pays to each row of the call, mean over heads, [rows]."""
        graph, decoder, name = self._graph, self._decoder, f"drop{drop}"
        heads, groups, width = decoder.heads, decoder.kv_heads, decoder.head_dim
        axis = graph.constant("slice.0", np.array([0], dtype=np.int64))
        ends = graph.constant(f"slice.{_END}", np.array([_END], dtype=np.int64))
        # At the positions that they have before the drop, whose rows these still are.
        tables = self._ops.rotary_rows(drop, decoder.rope_of(block))
        first = self._ops.past_of(drop)
        stop = graph.node("Add", [first, length], name=f"{name}.stop")
        angles = [
            graph.node("Slice", [table, first, stop, axis], name=f"{name}.angles")
            for table in tables
        ]
        one = graph.constant("one.int64", np.array([1], dtype=np.int64))
        before = graph.node("Sub", [stop, one], name=f"{name}.last")
        last = [
            graph.node("Slice", [table, before, stop, axis], name=f"{name}.last_angles")
            for table in tables
        ]
        attention, joined_last = decoder.attention(block), self._ops.last(joined)
        query = self._ops.head_part(joined_last, attention, attention.q, attention.q_norm)
        rope = decoder.rope_of(block)
        query = self._ops.turn(query, last, heads, rope, f"{name}.query")
        query = self._times(query, width**-0.5, f"{name}.scaled")
        query = self._reshape(query, [groups, heads // groups, width], f"{name}.queries")
        keys = self._ops.head_part(joined, attention, attention.k, attention.k_norm)
        keys = self._ops.turn(keys, angles, groups, rope, f"{name}.keys")
        keys = self._reshape(keys, [-1, groups, width], f"{name}.keys_by_row")
        keys = graph.node("Transpose", [keys], name=f"{name}.keys_by_head", perm=[1, 2, 0])
        past = self._ops.past_of(self._schedule.stage_of(block))
        keys = graph.node(
            "Concat", [self._past_keys(block, past, name), keys], name=f"{name}.every_key", axis=2
        )
        scores = graph.node("MatMul", [query, keys], name=f"{name}.scores")
        weights = graph.node("Softmax", [scores], name=f"{name}.weights", axis=-1)
        axes = graph.constant("heads.axes", np.array([0, 1], dtype=np.int64))
        mean = graph.node("ReduceMean", [weights, axes], name=f"{name}.mean", keepdims=0)
        return graph.node("Slice", [mean, past, ends, axis], name=f"{name}.attention")

    def _past_keys(self, block: int, past: str, name: str) -> str:
        """Keys of earlier calls as attention reads them, [groups, width, rows]."""
        graph = self._graph
        bounds = [
            graph.constant("slice.0", np.array([0], dtype=np.int64)),
            past,
            graph.constant("slice.2", np.array([2], dtype=np.int64)),
        ]
        keys = graph.node("Slice", [f"past.{block}.key", *bounds], name=f"{name}.past")
        if self._grid is not None:
            layer = self._decoder.attention_blocks.index(block)
            scales = self._grid.keys[layer][:, None].numpy()
            keys = graph.node(
                "Cast", [keys], name=f"{name}.past_float32", to=onnx.TensorProto.FLOAT
            )
            stored = graph.constant(f"{name}.key_scales", scales)
            keys = graph.node("Mul", [keys, stored], name=f"{name}.past_scaled")
        keys = self._reshape(
            keys, [self._decoder.kv_heads, -1, self._decoder.head_dim], f"{name}.past_by_head"
        )
        return graph.node("Transpose", [keys], name=f"{name}.past_keys", perm=[0, 2, 1])

    def _times(self, inputs: str, factor: float, name: str) -> str:
        constant = self._graph.constant(f"{name}.factor", np.array(factor, dtype=np.float32))
        return self._graph.node("Mul", [inputs, constant], name=name)

    def _reshape(self, inputs: str, shape: list[int], name: str) -> str:
        sizes = self._graph.constant(f"{name}.shape", np.array(shape, dtype=np.int64))
        return self._graph.node("Reshape", [inputs, sizes], name=name)


def _number(value: float) -> onnx.TensorProto:
    return onnx.helper.make_tensor("value", onnx.TensorProto.FLOAT, [1], [value])
