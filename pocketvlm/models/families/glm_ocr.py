"""GLM-OCR (arXiv 2603.10910): a tower with norms on its heads, a gated merger, a GLM-4 decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.blocks import BlockSpec
from pocketvlm.models.decoder import DecoderSpec
from pocketvlm.models.families.llama import read_llama
from pocketvlm.models.families.qwen_vision import PREFIX, read_qwen_tower, split_attention
from pocketvlm.models.folds import FlattenKernel, Fold, PairsToHalves, SplitRows, SumFrames
from pocketvlm.models.projector import (
    ActivationStep,
    GatedStep,
    LinearStep,
    NormStep,
    ProjectorSpec,
)
from pocketvlm.models.spec import ModelSpec, ProcessorSpec
from pocketvlm.models.tower import TowerSpec

__all__ = ["read_glm_ocr"]

_DOWNSAMPLE = f"{PREFIX}.downsample"
_TOKENIZER_KNOWS = ("image_start", "image_end", "video_start", "video_end")


def read_glm_ocr(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json of this family.

    Raises:
        UnsupportedError: Tower or decoder are others.
        KeyError: A field is missing.
    """
    for token in _TOKENIZER_KNOWS:
        config.get(f"{token}_token_id")
    vision, tower = config["vision_config"], _read_tower(config["vision_config"])
    decoder = _read_decoder(config)
    if vision["out_hidden_size"] != decoder.hidden_size:
        raise UnsupportedError(
            f"config.json: the tower ends in {vision['out_hidden_size']} channels and the decoder "
            f"has {decoder.hidden_size}"
        )
    return ModelSpec(
        family="glm_ocr",
        processor=ProcessorSpec(
            classes=("Glm46VProcessor",),
            counts_patches=False,
            stand_in="Glm46VProcessor",
            count_setting=None,
        ),
        model_type=config["model_type"],
        tower=tower,
        projector=_read_merger(vision),
        decoder=decoder,
        image_token_id=config["image_token_id"],
        image_token="<|image|>",  # noqa: S106  (a token of text, not a secret)
        image_prefix="",
        image_suffix="",
        folds=(
            SumFrames(target=f"{tower.patch_embedding}.weight"),
            *(f for i in range(tower.depth) for f in split_attention(i, tower.hidden_size)),
            FlattenKernel(target=f"{_DOWNSAMPLE}.weight"),
            *_decoder_folds(decoder),
        ),
    )


def _read_tower(vision: Mapping[str, Any]) -> TowerSpec:
    if not vision["attention_bias"]:
        raise UnsupportedError("config.json: vision_config.attention_bias must be true")
    vision.get("image_size")  # there is no table of positions
    tower = read_qwen_tower(
        vision,
        width=vision["hidden_size"],
        norm=f"{PREFIX}.post_layernorm",
        ffn=("gate_proj", "up_proj", "down_proj"),
        activation="silu",
    )
    return replace(
        tower,
        blocks=tuple(_with_head_norms(block) for block in tower.blocks),
        has_patch_bias=True,
        has_norm_bias=False,
        norm_eps=vision["rms_norm_eps"],
    )


def _with_head_norms(block: BlockSpec) -> BlockSpec:
    attention, module = block.attention, block.attention.module
    named = replace(attention, q_norm=f"{module}.q_norm", k_norm=f"{module}.k_norm")
    return replace(block, attention=named)


def _read_merger(vision: Mapping[str, Any]) -> ProjectorSpec:
    module, out = f"{PREFIX}.merger", vision["out_hidden_size"]
    return ProjectorSpec(
        merge_factor=vision["spatial_merge_size"],
        steps=(
            LinearStep(name=_DOWNSAMPLE, out_features=out, has_bias=True),
            LinearStep(name=f"{module}.proj", out_features=out, has_bias=False),
            NormStep(name=f"{module}.post_projection_norm", eps=1e-5),
            ActivationStep(activation="gelu"),
            GatedStep(
                gate=f"{module}.gate_proj",
                up=f"{module}.up_proj",
                out_features=out * vision.get("in_channels", 3),  # so in the library's class
                has_bias=False,
                activation=vision["hidden_act"],
            ),
            LinearStep(name=f"{module}.down_proj", out_features=out, has_bias=False),
        ),
    )


def _read_decoder(config: Mapping[str, Any]) -> DecoderSpec:
    share = config["text_config"]["rope_parameters"].get("partial_rotary_factor", 1.0)
    if share != 1.0:
        raise UnsupportedError(
            f"config.json: text_config.rope_parameters.partial_rotary_factor {share} is not "
            "supported; supported is 1.0"
        )
    decoder = read_llama(config, "model.language_model")
    blocks = [block for block in decoder.blocks if isinstance(block, BlockSpec)]
    return replace(decoder, blocks=tuple(_with_post_norms(block) for block in blocks))


def _with_post_norms(block: BlockSpec) -> BlockSpec:
    module = block.module
    return replace(
        block,
        attention=replace(block.attention, post_norm=f"{module}.post_self_attn_layernorm"),
        ffn=replace(block.ffn, post_norm=f"{module}.post_mlp_layernorm"),
    )


def _decoder_folds(decoder: DecoderSpec) -> Iterator[Fold]:
    """Gate and up are one linear where they are stored; neighbouring channels turn together."""
    for index, block in enumerate(decoder.blocks):
        attention, ffn = decoder.attention(index), block.ffn
        for name in (attention.q, attention.k):
            yield PairsToHalves(target=f"{name}.weight", width=decoder.head_dim)
        yield SplitRows(
            source=f"{ffn.module}.gate_up_proj.weight",
            targets=(f"{ffn.gate}.weight", f"{ffn.up}.weight"),
            sizes=(decoder.ffn_size,) * 2,
        )
