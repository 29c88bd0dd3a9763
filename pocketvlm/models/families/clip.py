"""Vision transformers of the CLIP kind (arXiv 2103.00020): CLIP's own and SigLIP (2303.15343)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketvlm.models.blocks import AttentionSpec, BlockSpec, FfnSpec
from pocketvlm.models.tower import TowerSpec

__all__ = ["read_clip", "read_siglip"]


def read_clip(vision: Mapping[str, Any], prefix: str, *, feature_block: int) -> TowerSpec:
    """CLIP: a [CLS] token, a norm before the blocks, and features from within them.

    Args:
        vision: `vision_config` of config.json.
        prefix: Module name of the tower.
        feature_block: Index of the last block that is run.

    Raises:
        KeyError: A field is missing.
    """
    return _read(
        vision,
        prefix,
        feature_block=feature_block,
        class_embedding="class_embedding",
        pre_norm=f"{prefix}.pre_layrnorm",  # spelled so in the original checkpoint
        has_patch_bias=False,
        has_post_norm=False,
        activation="quick_gelu",
        norm_eps=1e-5,
        image_size=vision["image_size"],
    )


def read_siglip(
    vision: Mapping[str, Any],
    prefix: str,
    *,
    feature_block: int | None = None,
    image_size: int | None = None,
) -> TowerSpec:
    """SigLIP: patches alone, with a bias.

    Args:
        vision: `vision_config` of config.json.
        prefix: Module name of the tower.
        feature_block: Index of the last block that is run, whose output is taken as it is; `None`
            for all blocks and the norm after them.
        image_size: Side of a picture, where the tower takes pictures of any size.

    Raises:
        KeyError: A field is missing.
    """
    last = vision["num_hidden_layers"] - 1
    return _read(
        vision,
        prefix,
        feature_block=last if feature_block is None else feature_block,
        class_embedding=None,
        pre_norm=None,
        has_patch_bias=True,
        has_post_norm=feature_block is None,
        activation="gelu_pytorch_tanh",
        norm_eps=1e-6,
        image_size=vision["image_size"] if image_size is None else image_size,
    )


def _read(
    vision: Mapping[str, Any],
    prefix: str,
    *,
    image_size: int,
    activation: str,
    norm_eps: float,
    **own: Any,
) -> TowerSpec:
    embeddings, stack = f"{prefix}.embeddings", f"{prefix}.encoder.layers"
    return TowerSpec(
        prefix=prefix,
        embeddings=embeddings,
        patch_embedding=f"{embeddings}.patch_embedding",
        position_embedding=f"{embeddings}.position_embedding",
        post_norm=f"{prefix}.post_layernorm",
        stack=stack,
        blocks=tuple(_block(f"{stack}.{index}") for index in range(vision["num_hidden_layers"])),
        hidden_size=vision["hidden_size"],
        ffn_size=vision["intermediate_size"],
        heads=vision["num_attention_heads"],
        height=image_size,
        width=image_size,
        patch_size=vision["patch_size"],
        channels=vision.get("num_channels", 3),
        activation=vision.get("hidden_act", activation),
        norm_eps=vision.get("layer_norm_eps", norm_eps),
        **own,
    )


def _block(module: str) -> BlockSpec:
    attention, mlp = f"{module}.self_attn", f"{module}.mlp"
    return BlockSpec(
        module=module,
        attention=AttentionSpec(
            module=attention,
            norm=f"{module}.layer_norm1",
            q=f"{attention}.q_proj",
            k=f"{attention}.k_proj",
            v=f"{attention}.v_proj",
            o=f"{attention}.out_proj",
        ),
        ffn=FfnSpec(
            module=mlp,
            norm=f"{module}.layer_norm2",
            gate=None,
            up=f"{mlp}.fc1",
            down=f"{mlp}.fc2",
        ),
    )
