"""LLaVA (arXiv 2304.08485, 2310.03744): a CLIP tower, two linears, a Llama decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.families.clip import read_clip
from pocketvlm.models.families.llama import read_llama
from pocketvlm.models.projector import ActivationStep, LinearStep, ProjectorSpec
from pocketvlm.models.spec import ModelSpec, ProcessorSpec

__all__ = ["read_llava"]


def read_llava(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json of this family.

    Raises:
        UnsupportedError: The tower is another, or features are taken in a way that is not known.
        KeyError: A field is missing.
    """
    vision = config["vision_config"]
    if vision.get("model_type") != "clip_vision_model":
        raise UnsupportedError(
            f"config.json: vision_config.model_type {vision.get('model_type')!r} is not supported "
            "for llava; supported is 'clip_vision_model'"
        )
    layer = config.get("vision_feature_layer", -2)
    strategy = config.get("vision_feature_select_strategy", "default")
    if not isinstance(layer, int) or strategy != "default":
        raise UnsupportedError(
            f"config.json: vision_feature_layer {layer!r} with strategy {strategy!r} is not "
            "supported; supported is one layer with strategy 'default'"
        )
    depth = vision["num_hidden_layers"]
    # hidden_states[0] is what enters the first block, so state i leaves block i - 1.
    state = layer if layer >= 0 else depth + 1 + layer
    if not 1 <= state <= depth:
        raise UnsupportedError(
            f"config.json: vision_feature_layer {layer} lies outside a tower of {depth} blocks"
        )
    decoder = read_llama(config, "model.language_model")
    return ModelSpec(
        family="llava",
        processor=ProcessorSpec(classes=("LlavaProcessor",), counts_patches=True),
        model_type=config["model_type"],
        tower=read_clip(vision, "model.vision_tower", feature_block=state - 1),
        projector=_read_projector(config, decoder.hidden_size),
        decoder=decoder,
        image_token_id=config["image_token_id"]
        if "image_token_id" in config
        else config["image_token_index"],
        image_token="<image>",  # noqa: S106  (a token of text, not a secret)
        image_prefix="",
        image_suffix="",
    )


def _read_projector(config: Mapping[str, Any], width: int) -> ProjectorSpec:
    has_bias = config.get("multimodal_projector_bias", True)
    module = "model.multi_modal_projector"
    return ProjectorSpec(
        merge_factor=1,
        steps=(
            LinearStep(name=f"{module}.linear_1", out_features=width, has_bias=has_bias),
            ActivationStep(activation=config.get("projector_hidden_act", "gelu")),
            LinearStep(name=f"{module}.linear_2", out_features=width, has_bias=has_bias),
        ),
    )
