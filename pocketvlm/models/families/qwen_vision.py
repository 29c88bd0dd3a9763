"""The vision towers of the Qwen-VL models: patches of pictures of any size, turned by place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.blocks import AttentionSpec, BlockSpec, FfnSpec
from pocketvlm.models.folds import Fold, SplitRows
from pocketvlm.models.tower import TowerSpec

__all__ = ["PREFIX", "read_qwen_tower", "split_attention"]

PREFIX = "model.visual"
"""Module name of the tower."""

_SIDE, _FRAMES = 448, 2


def read_qwen_tower(
    vision: Mapping[str, Any], *, width: int, norm: str, ffn: tuple[str, ...], activation: str
) -> TowerSpec:
    """The tower that `vision_config` describes.

    Args:
        vision: `vision_config` of config.json.
        width: Channels of a patch.
        norm: Module name of the norm after the last block, which the merger holds.
        ffn: Names of the linears of a feed-forward network, a gate first where there is one.
        activation: Hugging Face's name of the default activation.

    Raises:
        UnsupportedError: Patches are turned in another way, or show another number of frames.
        KeyError: A field is missing.
    """
    patch, depth = vision["patch_size"], vision["depth"]
    rope = vision.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") != "axial" or vision["temporal_patch_size"] != _FRAMES:
        raise UnsupportedError(
            "config.json: vision_config must have rope_type 'axial' and temporal_patch_size "
            f"{_FRAMES}"
        )
    positions = vision.get("num_position_embeddings")
    window, full = vision.get("window_size"), vision.get("fullatt_block_indexes", ())
    windows = [None if window is None or i in full else window // patch for i in range(depth)]
    inner = vision.get("intermediate_size") or int(width * vision["mlp_ratio"])
    return TowerSpec(
        prefix=PREFIX,
        embeddings=f"{PREFIX}.patch_embed",
        patch_embedding=f"{PREFIX}.patch_embed.proj",
        class_embedding=None,
        position_embedding=None if positions is None else f"{PREFIX}.pos_embed",
        pre_norm=None,
        post_norm=norm,
        stack=f"{PREFIX}.blocks",
        blocks=tuple(_block(i, ffn, window) for i, window in enumerate(windows)),
        feature_block=depth - 1,
        hidden_size=width,
        ffn_size=inner,
        heads=vision["num_heads"],
        height=_SIDE,
        width=_SIDE,
        patch_size=patch,
        channels=vision.get("in_channels", 3),
        has_patch_bias=positions is not None,
        has_post_norm=True,
        activation=vision.get("hidden_act", activation),
        norm_eps=1e-6,
        has_norm_bias=window is None,
        table_side=None if positions is None else int(positions**0.5),
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
    )


def _block(index: int, names: tuple[str, ...], window: int | None) -> BlockSpec:
    module = f"{PREFIX}.blocks.{index}"
    attention, (*gate, up, down) = f"{module}.attn", (f"{module}.mlp.{name}" for name in names)
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
            module=f"{module}.mlp",
            norm=f"{module}.norm2",
            gate=gate[0] if gate else None,
            up=up,
            down=down,
        ),
    )


def split_attention(block: int, width: int) -> tuple[Fold, ...]:
    """Queries, keys and values of a block, which are one linear where they are stored."""
    module = f"{PREFIX}.blocks.{block}.attn"
    return tuple(
        SplitRows(
            source=f"{module}.qkv.{kind}",
            targets=tuple(f"{module}.{name}.{kind}" for name in "qkv"),
            sizes=(width,) * 3,
        )
        for kind in ("weight", "bias")
    )
