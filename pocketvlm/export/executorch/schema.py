"""What a program says about itself: the constants of ExecuTorch's runner, and a schema for people.

`MultimodalRunner` reads the constant methods by name (extension/llm/runner/constants.h). Beyond
these, `get_model_schema` returns a JSON document that describes every method, so that an app can be
written against the file alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketvlm.models.reducer import TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = [
    "VISION",
    "VisionPart",
    "blank_picture",
    "constant_methods",
    "position_channels",
    "row_channels",
]

VISION = "vision_encoder"
"""The method of the first vision graph; those of others have their variant's name after it."""

_SCHEMA = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class VisionPart:
    """What one vision method is made of.

    Attributes:
        method: Its name.
        spec: The model, with the pictures that it takes.
        reducer: The token reduction, or `None`.
    """

    method: str
    spec: ModelSpec
    reducer: TokenReducer | None

    @property
    def kept(self) -> int:
        """Visual tokens that it returns."""
        return self.spec.visual_tokens if self.reducer is None else self.reducer.keep


def position_channels(spec: ModelSpec, reducer: TokenReducer | None) -> int:
    """Channels after an embedding that tell the decoder where a row is, where it cannot count.

    These are one for each axis of positions and one more; none where positions have no gaps.
    """
    axes = spec.decoder.rope.axes
    keeps_positions = reducer is None or reducer.positions == "original"
    has_gaps = keeps_positions and (reducer is not None or spec.leaves_tiles_out)
    return axes + 1 if has_gaps or axes > 1 else 0


def row_channels(spec: ModelSpec, reducer: TokenReducer | None) -> int:
    """Channels of a row: an embedding, and what the decoder must know of it."""
    channels = spec.row_width + position_channels(spec, reducer)
    return channels + (spec.decoder.mutual_rows is not None)


def blank_picture(spec: ModelSpec) -> Tensor:
    """Pixels of the shape that a vision method takes."""
    tower = spec.tower
    return torch.zeros(1, tower.channels, tower.height, tower.width)


def constant_methods(
    visions: Sequence[VisionPart],
    *,
    capacity: int,
    eos_token_ids: Sequence[int],
) -> dict[str, Any]:
    """The constant methods of a program, by name.

    Args:
        visions: The vision methods, first the one that a runner takes by itself.
        capacity: Rows of KV cache.
        eos_token_ids: Tokens that end an answer.
    """
    spec = visions[0].spec
    schema = _describe(visions, capacity=capacity, eos_token_ids=eos_token_ids)
    return {
        "get_max_seq_len": capacity,
        "get_max_context_len": capacity,
        "get_vocab_size": spec.decoder.vocab_size,
        "get_eos_ids": list(eos_token_ids),
        "get_n_layers": spec.decoder.depth,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_model_schema": json.dumps(schema, sort_keys=True),
    }


def _describe(
    visions: Sequence[VisionPart], *, capacity: int, eos_token_ids: Sequence[int]
) -> dict[str, Any]:
    spec, reducer = visions[0].spec, visions[0].reducer
    width = spec.row_width
    told = position_channels(spec, reducer)
    channels = row_channels(spec, reducer)
    length = {"min": 1, "max": capacity}
    document: dict[str, Any] = {
        "schema": _SCHEMA,
        "max_context_len": capacity,
        "hidden_size": width,
        "row_channels": channels,
        "visual_tokens": visions[0].kept,
        "visual_tokens_full": spec.visual_tokens,
        "image_token_id": spec.image_token_id,
        "eos_token_ids": list(eos_token_ids),
        "methods": {
            **{vision.method: _describe_vision(vision, channels) for vision in visions},
            "token_embedding": {
                "inputs": [_tensor("input_ids", "int64", 1, length)],
                "outputs": [_tensor("rows", "float32", 1, length, channels)],
            },
            "text_decoder": {
                "inputs": [
                    _tensor("rows", "float32", 1, length, channels),
                    _tensor("input_pos", "int64", 1),
                ],
                "outputs": [_tensor("logits", "float32", 1, 1, spec.decoder.vocab_size)],
            },
        },
        "runtime_constraints": [
            "input_pos is the number of rows in the cache before the call",
            "input_pos plus the rows of a call is at most max_context_len",
            "a picture's rows take the place of its placeholders in the prompt",
        ],
    }
    if told:
        axes = told - 1
        document["position_channels"] = {
            "offset": width if axes == 1 else list(range(width, width + axes)),
            "advance": width + axes,
            "meaning": "position = running + offset; running grows by advance behind each row",
        }
    if spec.decoder.mutual_rows is not None:
        document["mutual_channel"] = {
            "channel": channels - 1,
            "meaning": "rows of one call with the same number see each other; -1: the past alone",
        }
    return document


def _describe_vision(vision: VisionPart, channels: int) -> dict[str, Any]:
    tower = vision.spec.tower
    return {
        "inputs": [
            _tensor("pixel_values", "float32", 1, tower.channels, tower.height, tower.width)
        ],
        "outputs": [
            _tensor("rows", "float32", 1, vision.kept, channels),
            _tensor("indices", "int64", 1, vision.kept),
        ],
    }


def _tensor(name: str, dtype: str, *shape: int | dict[str, int]) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}
