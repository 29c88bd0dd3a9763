"""What a program says about itself: the constants of ExecuTorch's runner, and a schema for people.

`MultimodalRunner` reads the constant methods by name (extension/llm/runner/constants.h). Beyond
these, `get_model_schema` returns a JSON document that describes every method, so that an app can be
written against the file alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pocketvlm.models.reducer import TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["constant_methods", "position_channels", "row_channels"]

_SCHEMA = 1


def position_channels(spec: ModelSpec, reducer: TokenReducer | None) -> int:
    """Channels after an embedding that tell the decoder where a row is, where it cannot count.

    These are one for each axis of positions and one more; none where positions have no gaps.
    """
    axes = spec.decoder.rope.axes
    has_gaps = reducer is not None and reducer.positions == "original"
    return axes + 1 if has_gaps or axes > 1 else 0


def row_channels(spec: ModelSpec, reducer: TokenReducer | None) -> int:
    """Channels of a row: an embedding, and what the decoder must know of it."""
    channels = spec.row_width + position_channels(spec, reducer)
    return channels + (spec.decoder.mutual_rows is not None)


def constant_methods(
    spec: ModelSpec,
    reducer: TokenReducer | None,
    *,
    capacity: int,
    eos_token_ids: Sequence[int],
) -> dict[str, Any]:
    """The constant methods of a program, by name.

    Args:
        spec: The model.
        reducer: The token reduction, or `None`.
        capacity: Rows of KV cache.
        eos_token_ids: Tokens that end an answer.
    """
    schema = _describe(spec, reducer, capacity=capacity, eos_token_ids=eos_token_ids)
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
    spec: ModelSpec,
    reducer: TokenReducer | None,
    *,
    capacity: int,
    eos_token_ids: Sequence[int],
) -> dict[str, Any]:
    kept = spec.visual_tokens if reducer is None else reducer.keep
    width = spec.row_width
    told = position_channels(spec, reducer)
    channels = row_channels(spec, reducer)
    tower = spec.tower
    pixels = _tensor("pixel_values", "float32", 1, tower.channels, tower.height, tower.width)
    length = {"min": 1, "max": capacity}
    document: dict[str, Any] = {
        "schema": _SCHEMA,
        "max_context_len": capacity,
        "hidden_size": width,
        "row_channels": channels,
        "visual_tokens": kept,
        "visual_tokens_full": spec.visual_tokens,
        "image_token_id": spec.image_token_id,
        "eos_token_ids": list(eos_token_ids),
        "methods": {
            "vision_encoder": {
                "inputs": [pixels],
                "outputs": [
                    _tensor("rows", "float32", 1, kept, channels),
                    _tensor("indices", "int64", 1, kept),
                ],
            },
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


def _tensor(name: str, dtype: str, *shape: int | dict[str, int]) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}
