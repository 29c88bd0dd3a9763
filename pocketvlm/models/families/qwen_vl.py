"""Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (2502.13923) and Qwen3-VL (2511.21631)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.families.llama import read_llama
from pocketvlm.models.families.qwen_vision import PREFIX, read_qwen_tower, split_attention
from pocketvlm.models.folds import SumFrames
from pocketvlm.models.projector import (
    ActivationStep,
    LinearStep,
    NormStep,
    ProjectorSpec,
    ProjectorStep,
    TapSpec,
)
from pocketvlm.models.spec import ModelSpec, ProcessorSpec

__all__ = ["read_qwen_vl"]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What tells one generation from another: names of keys and of modules."""

    processor: str
    width: str
    out: str
    norm: str
    projector: tuple[str, str]
    ffn: tuple[str, ...]
    activation: str


_KINDS: Mapping[str, _Kind] = {
    "qwen2_vl": _Kind(
        processor="Qwen2VLProcessor",
        width="embed_dim",
        out="hidden_size",
        norm="ln_q",
        projector=("mlp.0", "mlp.2"),
        ffn=("fc1", "fc2"),
        activation="quick_gelu",
    ),
    "qwen2_5_vl": _Kind(
        processor="Qwen2_5_VLProcessor",
        width="hidden_size",
        out="out_hidden_size",
        norm="ln_q",
        projector=("mlp.0", "mlp.2"),
        ffn=("gate_proj", "up_proj", "down_proj"),
        activation="silu",
    ),
    "qwen3_vl": _Kind(
        processor="Qwen3VLProcessor",
        width="hidden_size",
        out="out_hidden_size",
        norm="norm",
        projector=("linear_fc1", "linear_fc2"),
        ffn=("linear_fc1", "linear_fc2"),
        activation="gelu_pytorch_tanh",
    ),
}


def read_qwen_vl(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json of this family.

    Raises:
        UnsupportedError: The decoder is another.
        KeyError: A field is missing.
    """
    vision, kind = config["vision_config"], _KINDS[config["model_type"]]
    width, depth, merge = vision[kind.width], vision["depth"], vision["spatial_merge_size"]
    decoder = read_llama(config, "model.language_model")
    if vision[kind.out] != decoder.hidden_size:
        raise UnsupportedError(
            f"config.json: the tower ends in {vision[kind.out]} channels and the decoder has "
            f"{decoder.hidden_size}"
        )
    wide, out = width * merge**2, decoder.hidden_size
    return ModelSpec(
        family="qwen_vl",
        processor=ProcessorSpec(
            classes=(kind.processor,),
            counts_patches=False,
            stand_in=kind.processor,
            count_setting=None,
        ),
        model_type=config["model_type"],
        tower=read_qwen_tower(
            vision,
            width=width,
            norm=f"{PREFIX}.merger.{kind.norm}",
            ffn=kind.ffn,
            activation=kind.activation,
        ),
        projector=ProjectorSpec(
            merge_factor=merge, steps=_steps(f"{PREFIX}.merger", kind, wide, out)
        ),
        decoder=decoder,
        image_token_id=config["image_token_id"],
        image_token="<|image_pad|>",  # noqa: S106  (a token of text, not a secret)
        image_prefix="",
        image_suffix="",
        folds=(
            SumFrames(target=f"{PREFIX}.patch_embed.proj.weight"),
            *(fold for block in range(depth) for fold in split_attention(block, width)),
        ),
        taps=tuple(
            TapSpec(
                block=block,
                steps=(
                    NormStep(name=f"{PREFIX}.deepstack_merger_list.{index}.norm", eps=1e-6),
                    *_steps(f"{PREFIX}.deepstack_merger_list.{index}", kind, wide, out),
                ),
            )
            for index, block in enumerate(vision.get("deepstack_visual_indexes", ()))
        ),
    )


def _steps(module: str, kind: _Kind, wide: int, out: int) -> tuple[ProjectorStep, ...]:
    first, last = (f"{module}.{name}" for name in kind.projector)
    return (
        LinearStep(name=first, out_features=wide, has_bias=True),
        ActivationStep(activation="gelu"),
        LinearStep(name=last, out_features=out, has_bias=True),
    )
