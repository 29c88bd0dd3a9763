"""Predicts the memory of a planned model on a device, beside the process of the app itself.

What is said of ONNX Runtime was measured: whatever is stored as floats becomes float32, and
products of integers keep float32 scales and a float32 sum for each group, in place of float16
scales; its library and its sessions take some memory as well. `docs/devices.md` has what was
predicted of some shapes and what they took.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pocketvlm.bundle import CacheLayout
from pocketvlm.device_bench.prediction.decoder_memory import DecoderMemory
from pocketvlm.device_bench.prediction.predicted import ONNX_RUNTIME_BYTES
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import PlanState, Target
from pocketvlm.stages.photo import photo_tokens
from pocketvlm.stages.plan_state import FLOAT_CACHE_BITS
from pocketvlm.weights.layout import AffineLayout, without_mask

__all__ = [
    "FLOAT32_BYTES",
    "TURN_TOKENS",
    "PlannedMemory",
    "decoder_memory",
    "predict_memory",
]

TURN_TOKENS = 256
"""The text of a short chat, in addition to the picture."""

FLOAT32_BYTES = 4
_GROUP_BYTES = 6  # in addition to a file's scale of 2 bytes: 4 for each of scale and sum


@dataclass(frozen=True, kw_only=True)
class PlannedMemory:
    """Predicted memory.

    Attributes:
        weight_bytes: Weights as the most demanding target's runtime holds them.
        cache_bytes: The decoder's cache for one photo and a short chat.
        activation_bytes: Of the vision graph at its peak, and what convolutions keep.
        prompt_bytes: Activations of the decoder for the same prompt.
        runtime_bytes: What the runtime takes for itself, where that was measured: ONNX Runtime.
    """

    weight_bytes: int
    cache_bytes: int
    activation_bytes: int
    prompt_bytes: int
    runtime_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it; what the vision graph took is given back before the decoder runs."""
        held = self.weight_bytes + self.cache_bytes + self.runtime_bytes
        return held + max(self.activation_bytes, self.prompt_bytes)


def predict_memory(
    state: PlanState, targets: Sequence[Target], *, spills_made: bool = False
) -> PlannedMemory:
    """What a model takes as its stages leave it.

    Args:
        state: The model.
        targets: The targets.
        spills_made: Whether weights that a runner makes when it starts lie in a file.
    """
    spec = state.spec
    is_onnx = any(isinstance(target, ToOnnx) for target in targets)
    rows = TURN_TOKENS + photo_tokens(state)
    return PlannedMemory(
        weight_bytes=max((_held_bytes(target, state, spills_made) for target in targets), default=0)
        + max((_other_towers_bytes(target, state) for target in targets), default=0),
        cache_bytes=_cache_bytes(state),
        activation_bytes=_activation_bytes(spec)
        + max((_state_bytes(target, spec) for target in targets), default=0),
        prompt_bytes=decoder_memory(state).call_bytes(rows, rows) if is_onnx else 0,
        runtime_bytes=ONNX_RUNTIME_BYTES if is_onnx else 0,
    )


def decoder_memory(state: PlanState) -> DecoderMemory:
    """Activations of the decoder: scores, and the widest rows of a block twice."""
    decoder = state.spec.decoder
    widths = {linear.name: linear.out_features for linear in state.spec.linears()}
    attention = (decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim
    ffn = max(sum(widths[name] for name in block.ffn.inputs) for block in decoder.blocks)
    return DecoderMemory(
        heads=decoder.heads if decoder.attention_blocks else 0,
        row_bytes=2 * FLOAT32_BYTES * (decoder.hidden_size + max(attention, ffn)),
        takes_pieces=decoder.mutual_rows is None and state.counted_schedule is None,
    )


def _held_bytes(target: Target, state: PlanState, spills_made: bool = False) -> int:
    """Bytes of the weights once they are loaded."""
    held = sum(target.predict(state.spec, state.layouts).part_bytes.values())
    if not isinstance(target, ToOnnx):
        return held
    held += target.prefill_bytes(state.spec, state.layouts)
    if spills_made:
        held -= target.made_bytes(state.spec, state.layouts)
    for linear, layout in state.layouts.items():
        rows, columns = linear.shape
        plain = without_mask(layout)
        is_table = linear.part == "embedding"
        if isinstance(plain, AffineLayout):
            multiplied = not is_table or state.spec.decoder.tied_head
            held += multiplied * rows * -(-columns // plain.group_size) * _GROUP_BYTES
        elif not is_table:
            held += rows * columns * FLOAT32_BYTES - target.layer_bytes(layout, linear.shape)
        elif state.spec.decoder.tied_head:  # the head is float32, beside the table that is stored
            held += rows * columns * FLOAT32_BYTES
    return held


def _other_towers_bytes(target: Target, state: PlanState) -> int:
    """Bytes of the towers beside the first that ONNX Runtime unpacks, where tiles have several."""
    if state.tile_budget is None or target.method != "onnx":
        return 0
    rest = {
        linear: layout
        for linear, layout in state.layouts.items()
        if linear.part not in ("tower", "projector")
    }
    one = _held_bytes(target, state) - _held_bytes(target, replace(state, layouts=rest))
    return (len(state.tile_budget.counts) - 1) * one


def _cache_bytes(state: PlanState) -> int:
    """Bytes of the decoder's cache for one picture and a short chat."""
    decoder = state.spec.decoder
    cache = CacheLayout(
        layers=len(decoder.attention_blocks),
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        dtype="float32" if state.cache_bits == FLOAT_CACHE_BITS else "int8",
        visual_schedule=state.counted_schedule,
    )
    return cache.stored_bytes(TURN_TOKENS, photo_tokens(state))


def _state_bytes(target: Target, spec: ModelSpec) -> int:
    """What short convolutions keep of the past: a few rows; in ExecuTorch, every row there is."""
    rows = [
        conv.taps - 1 + (target.capacity(spec) if target.method == "executorch" else 0)
        for conv in spec.decoder.convolutions.values()
    ]
    return FLOAT32_BYTES * spec.decoder.hidden_size * sum(rows)


def _activation_bytes(spec: ModelSpec) -> int:
    """Peak activations of the vision graph: scores of a block, and its widest rows twice."""
    tower = spec.tower
    windows = [block.attention.window for block in tower.blocks[: tower.feature_block + 1]]
    seen = max(tower.tokens if window is None else window**2 for window in windows)
    scores = tower.heads * tower.tokens * seen
    return FLOAT32_BYTES * (scores + 2 * tower.tokens * (3 * tower.hidden_size + tower.ffn_size))
