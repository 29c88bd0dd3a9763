"""The Llama decoder (arXiv 2302.13971, 2307.09288), which several families answer with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.spec import AttentionSpec, BlockSpec, DecoderSpec, FfnSpec

__all__ = ["read_llama"]


def read_llama(config: Mapping[str, Any], prefix: str) -> DecoderSpec:
    """The decoder that `text_config` describes.

    Args:
        config: Content of config.json.
        prefix: Module name of the text model.

    Raises:
        UnsupportedError: It is another decoder, or its positions are scaled.
        KeyError: A field is missing.
    """
    text = config["text_config"]
    supported = ("llama",)
    if text.get("model_type") not in supported:
        raise UnsupportedError(
            f"config.json: text_config.model_type {text.get('model_type')!r} is not supported; "
            f"supported are {', '.join(supported)}"
        )
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedError(
            f"config.json: text_config rope_type {rope['rope_type']!r} is not supported; "
            "supported is 'default'"
        )
    # transformers 4 wrote the base beside the scaling, transformers 5 writes it inside.
    theta = rope.get("rope_theta", text.get("rope_theta", 10_000.0))
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    stack = f"{prefix}.layers"
    return DecoderSpec(
        prefix=prefix,
        embedding=f"{prefix}.embed_tokens",
        rotary=f"{prefix}.rotary_emb",
        stack=stack,
        blocks=tuple(_block(f"{stack}.{index}") for index in range(text["num_hidden_layers"])),
        norm=f"{prefix}.norm",
        head="lm_head",
        hidden_size=hidden,
        ffn_size=text["intermediate_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or hidden // heads,
        vocab_size=text["vocab_size"],
        max_positions=text.get("max_position_embeddings", 2048),
        rope_theta=float(theta),
        norm_eps=text.get("rms_norm_eps", 1e-6),
        activation=text.get("hidden_act", "silu"),
        tied_head=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        has_qkv_bias=bool(text.get("attention_bias", False)),
        has_output_bias=bool(text.get("attention_bias", False)),
        has_mlp_bias=bool(text.get("mlp_bias", False)),
    )


def _block(module: str) -> BlockSpec:
    attention, mlp = f"{module}.self_attn", f"{module}.mlp"
    return BlockSpec(
        module=module,
        attention=AttentionSpec(
            module=attention,
            norm=f"{module}.input_layernorm",
            q=f"{attention}.q_proj",
            k=f"{attention}.k_proj",
            v=f"{attention}.v_proj",
            o=f"{attention}.o_proj",
        ),
        ffn=FfnSpec(
            module=mlp,
            norm=f"{module}.post_attention_layernorm",
            gate=f"{mlp}.gate_proj",
            up=f"{mlp}.up_proj",
            down=f"{mlp}.down_proj",
        ),
    )
