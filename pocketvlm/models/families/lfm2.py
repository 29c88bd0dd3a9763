"""The decoder of LFM2 (arXiv 2511.23404): short convolutions, and attention in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.blocks import (
    AttentionSpec,
    BlockSpec,
    ConvBlockSpec,
    DecoderBlock,
    FfnSpec,
    ShortConvSpec,
)
from pocketvlm.models.decoder import DecoderSpec, RopeSpec
from pocketvlm.models.folds import Fold, SplitRows

__all__ = ["conv_folds", "read_lfm2"]

_CONV, _ATTENTION = "conv", "full_attention"


def read_lfm2(config: Mapping[str, Any], prefix: str) -> DecoderSpec:
    """The decoder that `text_config` describes.

    Args:
        config: Content of config.json.
        prefix: Module name of the text model.

    Raises:
        UnsupportedError: It is another decoder, or its positions are scaled.
        KeyError: A field is missing.
    """
    text = config["text_config"]
    rope = text.get("rope_parameters") or {}
    for name, found, supported in (
        ("model_type", text.get("model_type", "lfm2"), "lfm2"),
        ("rope_type", rope.get("rope_type", "default"), "default"),
    ):
        if found != supported:
            raise UnsupportedError(
                f"config.json: text_config {name} {found!r} is not supported; supported is "
                f"{supported!r}"
            )
    theta = rope.get("rope_theta", text.get("rope_theta", 1e6))
    heads, hidden, stack = text["num_attention_heads"], text["hidden_size"], f"{prefix}.layers"
    head_dim = text.get("head_dim") or hidden // heads
    return DecoderSpec(
        prefix=prefix,
        embedding=f"{prefix}.embed_tokens",
        stack=stack,
        blocks=tuple(
            _block(f"{stack}.{index}", kind, text) for index, kind in enumerate(_kinds(text))
        ),
        norm=f"{prefix}.embedding_norm",
        head="lm_head",
        hidden_size=hidden,
        ffn_size=_ffn_size(text),
        heads=heads,
        kv_heads=text["num_key_value_heads"],
        head_dim=head_dim,
        vocab_size=text["vocab_size"],
        max_positions=text.get("max_position_embeddings", 128_000),
        rope=RopeSpec(theta=float(theta), width=head_dim),
        norm_eps=text.get("norm_eps", 1e-5),
        activation="silu",
        tied_head=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))),
        has_qkv_bias=False,
        has_output_bias=False,
        has_mlp_bias=False,
    )


def conv_folds(decoder: DecoderSpec) -> tuple[Fold, ...]:
    """The one linear that makes B, C and x, taken apart."""
    return tuple(
        SplitRows(
            source=f"{conv.module}.in_proj.{tensor}",
            targets=tuple(f"{name}.{tensor}" for name in conv.inputs),
            sizes=(decoder.hidden_size,) * len(conv.inputs),
        )
        for conv in decoder.convolutions.values()
        for tensor in (("weight", "bias") if conv.has_bias else ("weight",))
    )


def _kinds(text: Mapping[str, Any]) -> tuple[str, ...]:
    """What each layer has."""
    attention, kinds = text.get("full_attn_idxs"), text.get("layer_types")
    depth = text["num_hidden_layers"]
    if kinds is None:  # as the first releases wrote it
        places = range(depth) if attention is None else attention
        kinds = [_ATTENTION if index in places else _CONV for index in range(depth)]
    if len(kinds) != depth or not {*kinds} <= {_CONV, _ATTENTION}:
        raise UnsupportedError(
            f"config.json: text_config.layer_types must name {_CONV} or {_ATTENTION} for each of "
            f"{depth} layers"
        )
    return tuple(kinds)


def _ffn_size(text: Mapping[str, Any]) -> int:
    """Width of the FFN: of what config.json says two thirds, rounded up, where it says so."""
    size = int(text["intermediate_size"])
    multiplier, multiple = text.get("block_ffn_dim_multiplier", 1), text.get("block_multiple_of")
    if not text.get("block_auto_adjust_ff_dim", True):
        return size
    size, multiple = int(2 * size / 3), int(multiple or 256)
    return -(-int(multiplier * size) // multiple) * multiple


def _block(module: str, kind: str, text: Mapping[str, Any]) -> DecoderBlock:
    mlp, norm = f"{module}.feed_forward", f"{module}.operator_norm"
    gate, down, up = (f"{mlp}.w{number}" for number in (1, 2, 3))
    ffn = FfnSpec(module=mlp, norm=f"{module}.ffn_norm", gate=gate, up=up, down=down)
    if kind == _CONV:
        conv = f"{module}.conv"
        return ConvBlockSpec(
            module=module,
            conv=ShortConvSpec(
                module=conv,
                norm=norm,
                b=f"{conv}.b_proj",
                c=f"{conv}.c_proj",
                x=f"{conv}.x_proj",
                kernel=f"{conv}.conv",
                taps=text.get("conv_L_cache", 3),
                o=f"{conv}.out_proj",
                has_bias=bool(text.get("conv_bias", False)),
            ),
            ffn=ffn,
        )
    attention = f"{module}.self_attn"
    return BlockSpec(
        module=module,
        attention=AttentionSpec(
            module=attention,
            norm=norm,
            q=f"{attention}.q_proj",
            k=f"{attention}.k_proj",
            v=f"{attention}.v_proj",
            o=f"{attention}.out_proj",
            q_norm=f"{attention}.q_layernorm",
            k_norm=f"{attention}.k_layernorm",
        ),
        ffn=ffn,
    )
