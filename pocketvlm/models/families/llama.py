"""Decoders of the Llama kind: Llama (arXiv 2302.13971, 2307.09288), Qwen2 (2407.10671), Qwen3.

Qwen3 (2505.09388) has norms on the heads of queries and keys where Qwen2 has biases. Mistral
(2310.06825) is one of them where its window is none or wider than any context here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.blocks import AttentionSpec, BlockSpec, FfnSpec
from pocketvlm.models.decoder import DecoderSpec, RopeSpec

__all__ = ["decoder_block", "read_llama"]


def _llama_biases(text: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    attention = bool(text.get("attention_bias", False))
    return attention, attention, bool(text.get("mlp_bias", False))


def _attention_biases(text: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    return (*_llama_biases(text)[:2], False)


_BIASES: Mapping[str, Callable[[Mapping[str, Any]], tuple[bool, bool, bool]]] = {
    "llama": _llama_biases,
    "qwen2": lambda _: (True, False, False),
    "qwen3": _attention_biases,
    "qwen2_vl_text": lambda _: (True, False, False),
    "qwen2_5_vl_text": lambda _: (True, False, False),
    "mistral": lambda _: (False, False, False),
    "qwen3_vl_text": _attention_biases,
    "glm_ocr_text": lambda _: (False, False, False),
    "paddleocr_vl_text": lambda text: (bool(text["use_bias"]),) * 3,
}
"""Whether queries, keys and values, the attention's output and the FFN have biases, by decoder."""

_WITH_MULTIPLIERS = {"granite": _llama_biases}
"""The same of decoders that are of the Llama kind once multipliers are folded (`granite_folds`)."""

_ADDABLE: Mapping[Any, tuple[Literal["attention", "mlp"], ...]] = {
    _llama_biases: ("attention", "mlp"),
    _attention_biases: ("attention",),
}
"""Sublayers whose biases are a matter of config.json, by how they are read from it."""

_WITH_HEAD_NORMS = ("qwen3", "qwen3_vl_text")
_NO_WINDOW = 4096  # positions of the longest context of any bundle
_WINDOW_SETTINGS = ("use_sliding_window", "sliding_window", "max_window_layers")


_SECTIONS: Mapping[str, tuple[int, ...]] = {
    "qwen2_vl_text": (16, 24, 24),
    "qwen2_5_vl_text": (16, 24, 24),
    "qwen3_vl_text": (24, 20, 20),
    "glm_ocr_text": (8, 12, 12),
    "paddleocr_vl_text": (16, 24, 24),
}
"""Pairs of channels by axis of positions where a config does not say, by decoder."""


def read_llama(
    config: Mapping[str, Any], prefix: str, *, folds_multipliers: bool = False
) -> DecoderSpec:
    """The decoder that `text_config` describes.

    Args:
        config: Content of config.json.
        prefix: Module name of the text model.
        folds_multipliers: Whether the family folds those of a Granite decoder.

    Raises:
        UnsupportedError: It is another decoder, or its positions are scaled.
        KeyError: A field is missing.
    """
    text = config["text_config"]
    kind = text.get("model_type")
    biases = {**_BIASES, **(_WITH_MULTIPLIERS if folds_multipliers else {})}
    if kind not in biases:
        raise UnsupportedError(
            f"config.json: text_config.model_type {kind!r} is not supported; supported are "
            f"{', '.join(biases)}"
        )
    # What the window's settings mean is what the library's class writes into `layer_types`.
    window = ", ".join(f"{key} {text.get(key)!r}" for key in _WINDOW_SETTINGS)
    if any(layer != "full_attention" for layer in text.get("layer_types") or ()):
        raise UnsupportedError(
            f"config.json: text_config.layer_types has layers of sliding attention ({window}), "
            "which are not supported; supported is full attention in every layer"
        )
    if kind == "mistral" and (text.get("sliding_window") or _NO_WINDOW) < _NO_WINDOW:
        raise UnsupportedError(
            f"config.json: text_config.sliding_window {text['sliding_window']} is not supported; "
            f"supported are none, and windows of {_NO_WINDOW} positions or more, beyond which no "
            "bundle goes"
        )
    qkv, output, mlp = biases[kind](text)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope.get("type")  # its former name, from which the library's class has filled it
    scaling = rope.get("rope_type", "default")
    # Dynamic scaling begins after max_position_embeddings, where every bundle has ended.
    if scaling != "default" and not (scaling == "dynamic" and rope["factor"] >= 1):
        raise UnsupportedError(
            f"config.json: text_config rope_type {scaling!r} is not supported; supported are "
            "'default' and 'dynamic'"
        )
    sections = tuple(rope.get("mrope_section") or _SECTIONS.get(kind, ()))
    # transformers 4 wrote the base beside the scaling, transformers 5 writes it inside.
    theta = rope.get("rope_theta", text.get("rope_theta", 10_000.0))
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    head_dim = text.get("head_dim") or hidden // heads
    stack = f"{prefix}.layers"
    return DecoderSpec(
        prefix=prefix,
        embedding=f"{prefix}.embed_tokens",
        stack=stack,
        blocks=tuple(
            decoder_block(f"{stack}.{index}", has_head_norms=kind in _WITH_HEAD_NORMS)
            for index in range(text["num_hidden_layers"])
        ),
        norm=f"{prefix}.norm",
        head="lm_head",
        hidden_size=hidden,
        ffn_size=text["intermediate_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocab_size=text["vocab_size"],
        max_positions=text.get("max_position_embeddings", 2048),
        rope=RopeSpec(
            theta=float(theta),
            width=head_dim,
            sections=sections,
            is_interleaved=bool(rope.get("mrope_interleaved", False)),
        ),
        norm_eps=text.get("rms_norm_eps", 1e-6),
        activation=text.get("hidden_act", "silu"),
        tied_head=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        has_qkv_bias=qkv,
        has_output_bias=output,
        has_mlp_bias=mlp,
        addable_biases=_ADDABLE.get(biases[kind], ()),
    )


def decoder_block(module: str, *, has_head_norms: bool) -> BlockSpec:
    """A block of a decoder of this kind, by the name of its module.

    Args:
        module: The name.
        has_head_norms: Whether heads of queries and keys are normed before they are rotated.
    """
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
            q_norm=f"{attention}.q_norm" if has_head_norms else None,
            k_norm=f"{attention}.k_norm" if has_head_norms else None,
        ),
        ffn=FfnSpec(
            module=mlp,
            norm=f"{module}.post_attention_layernorm",
            gate=f"{mlp}.gate_proj",
            up=f"{mlp}.up_proj",
            down=f"{mlp}.down_proj",
        ),
    )
