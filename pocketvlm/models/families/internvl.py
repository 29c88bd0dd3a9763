"""InternVL3 (arXiv 2504.10479) and 3.5 (2508.18265): a large ViT, pixel shuffle, a Qwen decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.families.llama import read_llama
from pocketvlm.models.folds import Fold, Reshape, ScaleRows
from pocketvlm.models.projector import ActivationStep, LinearStep, NormStep, ProjectorSpec
from pocketvlm.models.spec import (
    AttentionSpec,
    BlockSpec,
    FfnSpec,
    ModelSpec,
    ProcessorSpec,
    TowerSpec,
)

__all__ = ["read_internvl"]

_TOWER, _PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
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
_ONLY: Mapping[str, Any] = {
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "vision_config.norm_type": "layer_norm",
    "vision_config.use_qk_norm": False,
    "vision_config.use_mask_token": False,
    "vision_config.use_absolute_position_embeddings": True,
}
"""Options with one supported value; those of the tower have others where it has 6 B parameters."""


def read_internvl(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json of this family.

    Raises:
        UnsupportedError: The decoder is another, or an option is not supported.
        KeyError: A field is missing.
    """
    for path, value in _ONLY.items():
        section, _, key = path.rpartition(".")
        found = (config[section] if section else config)[key]
        if found != value:
            raise UnsupportedError(
                f"config.json: {path} {found!r} is not supported; supported is {value!r}"
            )
    tower, decoder = (
        _read_tower(config["vision_config"]),
        read_llama(config, "model.language_model"),
    )
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
        folds=_folds(tower),
    )


def _read_tower(vision: Mapping[str, Any]) -> TowerSpec:
    embeddings, stack = f"{_TOWER}.embeddings", f"{_TOWER}.encoder.layer"
    depth, (height, width) = vision["num_hidden_layers"], vision["image_size"]
    rows, columns = vision["patch_size"]
    if height != width or rows != columns:
        raise UnsupportedError(
            f"config.json: vision_config has pictures of {height} x {width} and patches of {rows} "
            f"x {columns}; supported are squares"
        )
    # The library's class leaves the norm out where it would pool afterwards.
    has_norm = not vision["use_mean_pooling"]
    return TowerSpec(
        prefix=_TOWER,
        embeddings=embeddings,
        patch_embedding=f"{embeddings}.patch_embeddings.projection",
        class_embedding="cls_token",
        position_embedding=f"{embeddings}.position_embeddings",
        pre_norm=None,
        post_norm=f"{_TOWER}.layernorm" if has_norm else None,
        stack=stack,
        blocks=tuple(_block(f"{stack}.{index}") for index in range(depth)),
        feature_block=depth - 1,
        hidden_size=vision["hidden_size"],
        ffn_size=vision["intermediate_size"],
        heads=vision["num_attention_heads"],
        height=height,
        width=width,
        patch_size=rows,
        channels=vision["num_channels"],
        has_patch_bias=True,
        has_post_norm=has_norm,
        activation=vision["hidden_act"],
        norm_eps=vision["layer_norm_eps"],
        has_qkv_bias=vision["attention_bias"],
    )


def _block(module: str) -> BlockSpec:
    attention, mlp = f"{module}.attention", f"{module}.mlp"
    queries, keys, values = (f"{attention}.{key}_proj" for key in "qkv")
    output, norms = f"{attention}.projection_layer", f"{module}.layernorm"
    up, down = f"{mlp}.fc1", f"{mlp}.fc2"
    return BlockSpec(
        module=module,
        attention=AttentionSpec(
            module=attention, norm=f"{norms}_before", q=queries, k=keys, v=values, o=output
        ),
        ffn=FfnSpec(module=mlp, norm=f"{norms}_after", gate=None, up=up, down=down),
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


def _folds(tower: TowerSpec) -> tuple[Fold, ...]:
    """LayerScale into what it scales; bare parameters as a vector and as a table."""
    token, table = f"{tower.embeddings}.cls_token", str(tower.position_embedding)
    width = tower.hidden_size
    return (
        Reshape(source=token, target=token, shape=(width,)),
        Reshape(source=table, target=f"{table}.weight", shape=(tower.tokens, width)),
        *(
            ScaleRows(target=f"{sublayer.output}.{kind}", scale=f"{block.module}.{scale}")
            for block in tower.blocks
            for sublayer, scale in ((block.attention, "lambda_1"), (block.ffn, "lambda_2"))
            for kind in ("weight", "bias")
        ),
    )
