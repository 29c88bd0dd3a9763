"""InternViT (arXiv 2312.14238): a ViT whose sublayers are scaled channel by channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.blocks import AttentionSpec, BlockSpec, FfnSpec
from pocketvlm.models.folds import Fold, Reshape, ScaleRows
from pocketvlm.models.tower import TowerSpec

__all__ = ["internvit_folds", "read_internvit"]

_ONLY: Mapping[str, Any] = {
    "norm_type": "layer_norm",
    "use_qk_norm": False,
    "use_mask_token": False,
    "use_absolute_position_embeddings": True,
}
"""Options with one supported value; the towers of 6 B parameters have others."""


def read_internvit(vision: Mapping[str, Any], prefix: str) -> TowerSpec:
    """The tower that `vision_config` describes.

    Args:
        vision: `vision_config` of config.json.
        prefix: Module name of the tower.

    Raises:
        UnsupportedError: An option is not supported.
        KeyError: A field is missing.
    """
    for key, value in _ONLY.items():
        if vision[key] != value:
            raise UnsupportedError(
                f"config.json: vision_config.{key} {vision[key]!r} is not supported; supported is "
                f"{value!r}"
            )
    embeddings, stack = f"{prefix}.embeddings", f"{prefix}.encoder.layer"
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
        prefix=prefix,
        embeddings=embeddings,
        patch_embedding=f"{embeddings}.patch_embeddings.projection",
        class_embedding="cls_token",
        position_embedding=f"{embeddings}.position_embeddings",
        pre_norm=None,
        post_norm=f"{prefix}.layernorm" if has_norm else None,
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


def internvit_folds(tower: TowerSpec) -> tuple[Fold, ...]:
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
