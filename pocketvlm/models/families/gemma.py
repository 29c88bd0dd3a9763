"""Decoders of the Gemma kind: Gemma (arXiv 2403.08295), Gemma 2 (2408.00118), Gemma 3 (2503.19786).

They scale embeddings by the root of their width, store norms as what is added to 1, and share the
embedding with the head. Gemma 2 and 3 also norm what a sublayer returns, and let some layers see a
window of the past alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.blocks import BlockSpec
from pocketvlm.models.decoder import DecoderSpec, RopeSpec, SlidingSpec
from pocketvlm.models.families.llama import decoder_block
from pocketvlm.models.folds import AddOne, Fold

__all__ = ["norm_folds", "read_gemma"]

_FULL, _SLIDING = "full_attention", "sliding_attention"


def read_gemma(
    config: Mapping[str, Any],
    prefix: str,
    *,
    kinds: tuple[str, ...],
    mutual_rows: Literal["tile", "prompt"],
) -> DecoderSpec:
    """The decoder that `text_config` describes.

    Args:
        config: Content of config.json.
        prefix: Module name of the text model.
        kinds: Values of its `model_type` that are known.
        mutual_rows: `DecoderSpec.mutual_rows`.

    Raises:
        UnsupportedError: It is another decoder, or scales scores or positions otherwise.
        KeyError: A field is missing.
    """
    text = config["text_config"]
    kind = text.get("model_type")
    if kind not in kinds:
        raise UnsupportedError(
            f"config.json: text_config.model_type {kind!r} is not supported; supported are "
            f"{', '.join(kinds)}"
        )
    heads, head_dim = text["num_attention_heads"], text["head_dim"]
    if text.get("query_pre_attn_scalar", head_dim) != head_dim:
        raise UnsupportedError(
            f"config.json: text_config.query_pre_attn_scalar {text['query_pre_attn_scalar']} is "
            f"not supported; supported is head_dim, {head_dim}"
        )
    depth, is_first = text["num_hidden_layers"], kind == "gemma"
    types = [_FULL] * depth if is_first else list(text["layer_types"])
    if len(types) != depth or not set(types) <= {_FULL, _SLIDING}:
        raise UnsupportedError(
            f"config.json: text_config.layer_types must name {_FULL} or {_SLIDING} for each of "
            f"{depth} layers"
        )
    text.get("_sliding_window_pattern")  # says what layer_types say
    ropes = text["rope_parameters"]
    whole, local = (ropes[_FULL], ropes[_SLIDING]) if kind == "gemma3_text" else (ropes, ropes)
    stack = f"{prefix}.layers"
    blocks = [
        _block(f"{stack}.{index}", is_sliding=types[index] == _SLIDING, kind=kind)
        for index in range(depth)
    ]
    has_bias = bool(text["attention_bias"])
    return DecoderSpec(
        prefix=prefix,
        embedding=f"{prefix}.embed_tokens",
        stack=stack,
        blocks=tuple(blocks),
        norm=f"{prefix}.norm",
        head="lm_head",
        hidden_size=text["hidden_size"],
        ffn_size=text["intermediate_size"],
        heads=heads,
        kv_heads=text["num_key_value_heads"],
        head_dim=head_dim,
        vocab_size=text["vocab_size"],
        max_positions=text["max_position_embeddings"],
        rope=_rope(whole, head_dim),
        sliding=SlidingSpec(window=text["sliding_window"], rope=_rope(local, head_dim))
        if _SLIDING in types
        else None,
        mutual_rows=mutual_rows,
        norm_eps=text["rms_norm_eps"],
        activation=text["hidden_act" if is_first else "hidden_activation"],
        tied_head=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))),
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        has_mlp_bias=False,
        addable_biases=("attention",),
        embed_scale=float(text["hidden_size"]) ** 0.5,
        score_softcap=text["attn_logit_softcapping"] if kind == "gemma2" else None,
        logit_softcap=text["final_logit_softcapping"] if kind == "gemma2" else None,
    )


def norm_folds(decoder: DecoderSpec) -> tuple[Fold, ...]:
    """Folds of all norms of a decoder, which hold what is added to 1."""
    norms = [decoder.norm]
    for index, block in enumerate(decoder.blocks):
        attention, ffn = decoder.attention(index), block.ffn
        norms += [attention.norm, ffn.norm]
        own = (attention.q_norm, attention.k_norm, attention.post_norm, ffn.post_norm)
        norms += [name for name in own if name is not None]
    return tuple(AddOne(target=f"{name}.weight") for name in norms)


def _rope(rope: Mapping[str, Any], width: int) -> RopeSpec:
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise UnsupportedError(
            f"config.json: text_config rope_type {kind!r} is not supported; supported are default "
            "and linear"
        )
    factor = float(rope.get("factor", 1.0))
    return RopeSpec(theta=float(rope["rope_theta"]), width=width, factor=factor)


def _block(module: str, *, is_sliding: bool, kind: str) -> BlockSpec:
    block = decoder_block(module, has_head_norms=kind == "gemma3_text")
    attention, ffn = replace(block.attention, is_sliding=is_sliding), block.ffn
    if kind != "gemma":
        attention = replace(attention, post_norm=f"{module}.post_attention_layernorm")
        ffn = replace(
            ffn,
            norm=f"{module}.pre_feedforward_layernorm",
            post_norm=f"{module}.post_feedforward_layernorm",
        )
    return replace(block, attention=attention, ffn=ffn)
