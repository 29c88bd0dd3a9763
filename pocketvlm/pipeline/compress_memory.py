"""Predicts the memory that `compress` itself takes, which a large model must leave room for.

Weights, finished layers, states of calibration and what a runner makes for long calls lie in files
whose pages the system takes back when memory is short. What is counted here has to stay: the
libraries, one layer with the statistics of its input, and what the certificate holds of the
artifact. A stage that trains the whole model holds it; the source check takes a float copy of the
model only where there is room for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from pocketvlm.compress.layerwise.hessian import diagonal_block_width
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.spec import ModelSpec
from pocketvlm.pipeline.plan_memory import FLOAT32_BYTES, predict_memory
from pocketvlm.stages import PlanState, Stage, Target
from pocketvlm.stages.walk_options import WalkOptions

__all__ = ["predict_compress_bytes"]

_LIBRARIES_BYTES = 900_000_000
"""Python with torch, transformers, onnx and ONNX Runtime, pictures, and a batch of states."""

_CODES_BYTES = 3
"""A weight while it is rounded: its code, once more where they are joined, grids in float64."""

_UNPACKED_BYTES = FLOAT32_BYTES + 1  # a weight that is multiplied: its code and its value
_FLOAT64_BYTES = 8


def predict_compress_bytes(
    before: ModelSpec, state: PlanState, stages: Sequence[Stage], targets: Sequence[Target]
) -> int:
    """The least memory in which a run ends.

    Args:
        before: The source model.
        state: The model as the stages leave it.
        stages: The stages.
        targets: The targets.
    """
    walks = any(isinstance(stage, WalkOptions) for stage in stages)
    working = (
        [_rounding_bytes(linear, walks=walks) for linear in before.linears()] if stages else []
    )
    weights = sum(linear.out_features * linear.in_features for linear in before.linears())
    held = max((FLOAT32_BYTES * weights for stage in stages if stage.holds_model), default=0)
    return _LIBRARIES_BYTES + max(
        held + max(working, default=0), _certificate_bytes(state, targets)
    )


def _rounding_bytes(linear: LinearSpec, *, walks: bool) -> int:
    """One layer while it is rounded, with the statistics of its input."""
    width, elements = linear.in_features, linear.in_features * linear.out_features
    if not walks:
        return _CODES_BYTES * elements
    block = diagonal_block_width(width, ()) or width
    moment = width * block * (_FLOAT64_BYTES if width <= 1024 else FLOAT32_BYTES)  # noqa: PLR2004
    factor = width * block * _FLOAT64_BYTES
    return 2 * moment + factor + _CODES_BYTES * elements


def _certificate_bytes(state: PlanState, targets: Sequence[Target]) -> int:
    """The artifact as its runtime holds it, and the head in torch, which answers beside it."""
    decoder = state.spec.decoder
    head = _UNPACKED_BYTES * decoder.vocab_size * decoder.hidden_size
    memory = predict_memory(state, targets, spills_made=True)
    return memory.weight_bytes + memory.activation_bytes + head
