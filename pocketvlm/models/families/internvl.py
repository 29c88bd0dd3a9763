"""InternVL3 (arXiv 2504.10479), 3.5 (2508.18265): InternViT, pixel shuffle, a Qwen decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.families.internvit import internvit_folds, read_internvit
from pocketvlm.models.families.llama import read_llama
from pocketvlm.models.projector import ActivationStep, LinearStep, NormStep, ProjectorSpec
from pocketvlm.models.spec import ModelSpec, ProcessorSpec

__all__ = ["read_internvl"]

_PROJECTOR = "model.multi_modal_projector"
_PLACEHOLDER, _BEGIN, _END = "<IMG_CONTEXT>", "<img>", "</img>"
_PROCESSOR = ProcessorSpec(
    classes=("InternVLProcessor",),
    counts_patches=False,
    stand_in="InternVLProcessor",
    count_setting="image_seq_length",
    default_count=256,
    named_tokens={
        "context_image_token": _PLACEHOLDER,
        "start_image_token": _BEGIN,
        "end_image_token": _END,
    },
)


def read_internvl(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json of this family.

    Raises:
        UnsupportedError: The decoder is another, or an option is not supported.
        KeyError: A field is missing.
    """
    layer, strategy = config["vision_feature_layer"], config["vision_feature_select_strategy"]
    if layer != -1 or strategy != "default":
        raise UnsupportedError(
            f"config.json: vision_feature_layer {layer!r} with strategy {strategy!r} is not "
            "supported; supported is -1 with strategy 'default'"
        )
    tower = read_internvit(config["vision_config"], "model.vision_tower")
    decoder = read_llama(config, "model.language_model")
    return ModelSpec(
        family="internvl",
        processor=_PROCESSOR,
        model_type=config["model_type"],
        tower=tower,
        projector=_read_projector(config, decoder.hidden_size),
        decoder=decoder,
        image_token_id=config["image_token_id"],
        image_token=_PLACEHOLDER,
        image_prefix=_BEGIN,
        image_suffix=_END,
        folds=internvit_folds(tower),
    )


def _read_projector(config: Mapping[str, Any], width: int) -> ProjectorSpec:
    ratio = config["downsample_ratio"]
    if 1 % ratio:
        raise UnsupportedError(
            f"config.json: downsample_ratio {ratio} is not supported; supported is 1 by a number"
        )
    return ProjectorSpec(
        merge_factor=int(1 / ratio),
        steps=(
            NormStep(name=f"{_PROJECTOR}.layer_norm", eps=1e-5),
            LinearStep(name=f"{_PROJECTOR}.linear_1", out_features=width, has_bias=True),
            ActivationStep(activation=config["projector_hidden_act"]),
            LinearStep(name=f"{_PROJECTOR}.linear_2", out_features=width, has_bias=True),
        ),
    )
