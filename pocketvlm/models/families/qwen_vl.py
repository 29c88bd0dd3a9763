"""Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (2502.13923): towers for pictures of any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.families.llama import read_llama
from pocketvlm.models.folds import Fold, SplitRows, SumFrames
from pocketvlm.models.projector import ActivationStep, LinearStep, ProjectorSpec
from pocketvlm.models.spec import (
    AttentionSpec,
    BlockSpec,
    FfnSpec,
    ModelSpec,
    ProcessorSpec,
    TowerSpec,
)

__all__ = ["read_qwen_vl"]

_PREFIX = "model.visual"
_SIDE = 448
_FRAMES = 2
_PROCESSORS = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
}


def read_qwen_vl(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json of this family.

    Raises:
        UnsupportedError: The decoder is another.
        KeyError: A field is missing.
    """
    vision, kind = config["vision_config"], config["model_type"]
    if kind == "qwen2_vl":
        width, out, ffn = vision["embed_dim"], vision["hidden_size"], None
    else:
        width, out, ffn = vision["hidden_size"], vision["out_hidden_size"], "gated"
    decoder = read_llama(config, "model.language_model")
    if out != decoder.hidden_size:
        raise UnsupportedError(
            f"config.json: the tower ends in {out} channels and the decoder has "
            f"{decoder.hidden_size}"
        )
    processor = _PROCESSORS[kind]
    return ModelSpec(
        family="qwen_vl",
        processor=ProcessorSpec(
            classes=(processor,), counts_patches=False, stand_in=processor, count_setting=None
        ),
        model_type=kind,
        tower=_read_tower(vision, width, is_gated=ffn is not None),
        projector=_read_projector(vision["spatial_merge_size"], width, out),
        decoder=decoder,
        image_token_id=config["image_token_id"],
        image_token="<|image_pad|>",  # noqa: S106  (a token of text, not a secret)
        image_prefix="",
        image_suffix="",
        folds=(
            SumFrames(target=f"{_PREFIX}.patch_embed.proj.weight"),
            *(fold for block in range(vision["depth"]) for fold in _split_attention(block, width)),
        ),
    )


def _read_tower(vision: Mapping[str, Any], width: int, *, is_gated: bool) -> TowerSpec:
    patch, depth = vision["patch_size"], vision["depth"]
    rope = vision.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") != "axial" or vision["temporal_patch_size"] != _FRAMES:
        raise UnsupportedError(
            "config.json: vision_config must have rope_type 'axial' and temporal_patch_size "
            f"{_FRAMES}"
        )
    window, full = None, tuple[int, ...]()
    if is_gated:
        window, full = vision["window_size"] // patch, tuple(vision["fullatt_block_indexes"])
    return TowerSpec(
        prefix=_PREFIX,
        embeddings=f"{_PREFIX}.patch_embed",
        patch_embedding=f"{_PREFIX}.patch_embed.proj",
        class_embedding=None,
        position_embedding=None,
        pre_norm=None,
        post_norm=f"{_PREFIX}.merger.ln_q",
        stack=f"{_PREFIX}.blocks",
        blocks=tuple(
            _block(index, is_gated=is_gated, window=None if index in full else window)
            for index in range(depth)
        ),
        feature_block=depth - 1,
        hidden_size=width,
        ffn_size=vision["intermediate_size"] if is_gated else int(width * vision["mlp_ratio"]),
        heads=vision["num_heads"],
        height=_SIDE,
        width=_SIDE,
        patch_size=patch,
        channels=vision.get("in_channels", 3),
        has_patch_bias=False,
        has_post_norm=True,
        activation=vision.get("hidden_act", "silu" if is_gated else "quick_gelu"),
        norm_eps=1e-6,
        has_norm_bias=not is_gated,
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
    )


def _block(index: int, *, is_gated: bool, window: int | None) -> BlockSpec:
    module = f"{_PREFIX}.blocks.{index}"
    attention, mlp = f"{module}.attn", f"{module}.mlp"
    return BlockSpec(
        module=module,
        attention=AttentionSpec(
            module=attention,
            norm=f"{module}.norm1",
            q=f"{attention}.q",
            k=f"{attention}.k",
            v=f"{attention}.v",
            o=f"{attention}.proj",
            window=window,
        ),
        ffn=FfnSpec(
            module=mlp,
            norm=f"{module}.norm2",
            gate=f"{mlp}.gate_proj" if is_gated else None,
            up=f"{mlp}.up_proj" if is_gated else f"{mlp}.fc1",
            down=f"{mlp}.down_proj" if is_gated else f"{mlp}.fc2",
        ),
    )


def _split_attention(block: int, width: int) -> tuple[Fold, ...]:
    """Queries, keys and values are one linear where they are stored."""
    module = f"{_PREFIX}.blocks.{block}.attn"
    return tuple(
        SplitRows(
            source=f"{module}.qkv.{kind}",
            targets=tuple(f"{module}.{name}.{kind}" for name in "qkv"),
            sizes=(width,) * 3,
        )
        for kind in ("weight", "bias")
    )


def _read_projector(merge: int, width: int, out: int) -> ProjectorSpec:
    module = f"{_PREFIX}.merger.mlp"
    return ProjectorSpec(
        merge_factor=merge,
        steps=(
            LinearStep(name=f"{module}.0", out_features=width * merge**2, has_bias=True),
            ActivationStep(activation="gelu"),
            LinearStep(name=f"{module}.2", out_features=out, has_bias=True),
        ),
    )
