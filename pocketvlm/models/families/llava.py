"""LLaVA (arXiv 2304.08485, 2310.03744): a tower of the CLIP kind, two linears, any decoder.

LLaVA-1.5 has CLIP and Llama; the LLaVA-Interleave models have SigLIP and Qwen2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.families.clip import read_clip, read_siglip
from pocketvlm.models.families.granite import granite_folds
from pocketvlm.models.families.llama import read_llama
from pocketvlm.models.projector import ActivationStep, LinearStep, ProjectorSpec
from pocketvlm.models.spec import ModelSpec, ProcessorSpec
from pocketvlm.models.tower import TowerSpec

__all__ = ["read_llava"]

_TOWERS: Mapping[str, tuple[Callable[..., TowerSpec], str]] = {
    "clip_vision_model": (read_clip, "default"),
    "siglip_vision_model": (read_siglip, "full"),
}
"""Readers of towers, and which tokens are features: all but [CLS] by default, or all in full."""


def read_llava(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json of this family.

    Raises:
        UnsupportedError: The tower is another, or features are taken in a way that is not known.
        KeyError: A field is missing.
    """
    vision = config["vision_config"]
    kind = str(vision.get("model_type"))
    if kind not in _TOWERS:
        raise UnsupportedError(
            f"config.json: vision_config.model_type {kind!r} is not supported for llava; supported "
            f"are {', '.join(_TOWERS)}"
        )
    read_tower, only = _TOWERS[kind]
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy != only:
        raise UnsupportedError(
            f"config.json: vision_feature_select_strategy {strategy!r} is not supported for "
            f"{kind}; supported is {only!r}"
        )
    *earlier, last = _feature_blocks(config, vision["num_hidden_layers"])
    tower = read_tower(vision, "model.vision_tower", feature_block=last)
    decoder = read_llama(config, "model.language_model", folds_multipliers=True)
    spec = ModelSpec(
        family="llava",
        processor=ProcessorSpec(classes=("LlavaProcessor",), counts_patches=True),
        model_type=config["model_type"],
        tower=replace(tower, earlier_features=tuple(earlier)),
        projector=_read_projector(config, decoder.hidden_size),
        decoder=decoder,
        image_token_id=config["image_token_id"]
        if "image_token_id" in config
        else config["image_token_index"],
        image_token="<image>",  # noqa: S106  (a token of text, not a secret)
        image_prefix="",
        image_suffix="",
    )
    return replace(spec, folds=granite_folds(config["text_config"], spec))


def _feature_blocks(config: Mapping[str, Any], depth: int) -> list[int]:
    """Blocks whose outputs are features, in order."""
    stated = config.get("vision_feature_layer", -2)
    layers = list(stated) if isinstance(stated, list | tuple) else [stated]
    # hidden_states[0] is what enters the first block, so state i leaves block i - 1.
    blocks = [(layer if layer >= 0 else depth + 1 + layer) - 1 for layer in layers]
    if not blocks or blocks != sorted(set(blocks)) or blocks[0] < 0 or blocks[-1] >= depth:
        raise UnsupportedError(
            f"config.json: vision_feature_layer {stated} is not supported; supported are states of "
            f"the {depth} blocks, each once and in their order"
        )
    return blocks


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
