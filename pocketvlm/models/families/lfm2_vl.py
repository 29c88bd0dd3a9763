"""LFM2-VL (arXiv 2511.23404): SigLIP 2 for pictures of any size, short convolutions, few attention.

Pictures are brought to one size, that of the processor's tiles: twice the side of the table of
positions, 512 x 512 for published models. The table is resampled to it once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.families.clip import read_siglip
from pocketvlm.models.families.lfm2 import conv_folds, read_lfm2
from pocketvlm.models.folds import PatchKernel, ResizeTable
from pocketvlm.models.projector import ActivationStep, LinearStep, NormStep, ProjectorSpec
from pocketvlm.models.spec import ModelSpec, ProcessorSpec
from pocketvlm.models.tower import TowerSpec

__all__ = ["read_lfm2_vl"]

_START, _END, _WHOLE = "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"
_NAMED = {
    "image_start_token": _START,
    "image_end_token": _END,
    "image_thumbnail_token": _WHOLE,
}
_TOWER = "siglip2_vision_model"
_PICTURE_SIDES = 2  # sides of the table of positions along one side of a picture


def read_lfm2_vl(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json of this family.

    Raises:
        UnsupportedError: Tower or decoder are others.
        KeyError: A field is missing.
    """
    kind = config["vision_config"].get("model_type", _TOWER)
    if kind != _TOWER:
        raise UnsupportedError(
            f"config.json: vision_config.model_type {kind!r} is not supported for lfm2_vl; "
            f"supported is {_TOWER}"
        )
    tower = _read_tower(config["vision_config"])
    decoder = read_lfm2(config, "model.language_model")
    return ModelSpec(
        family="lfm2_vl",
        processor=ProcessorSpec(
            classes=("Lfm2VlProcessor",),
            counts_patches=False,
            stand_in="Lfm2VlProcessor",
            named_tokens=_NAMED,
            count_setting=None,
        ),
        model_type=config["model_type"],
        tower=tower,
        projector=_read_projector(config, decoder.hidden_size),
        decoder=decoder,
        image_token_id=config["image_token_id"],
        image_token="<image>",  # noqa: S106  (a token of text, not a secret)
        image_prefix=_START,
        image_suffix=_END,
        tile_marker="<|img_row_{row}_col_{column}|>",
        whole_marker=_WHOLE,
        folds=(
            PatchKernel(
                target=f"{tower.patch_embedding}.weight",
                channels=tower.channels,
                size=tower.patch_size,
            ),
            ResizeTable(
                target=f"{tower.position_embedding}.weight",
                rows=tower.rows,
                columns=tower.columns,
            ),
            *conv_folds(decoder),
        ),
    )


def _read_tower(vision: Mapping[str, Any]) -> TowerSpec:
    side = math.isqrt(vision.get("num_patches", 256))
    size = _PICTURE_SIDES * side * vision["patch_size"]
    return read_siglip(vision, "model.vision_tower", image_size=size)


def _read_projector(config: Mapping[str, Any], width: int) -> ProjectorSpec:
    module, has_bias = "model.multi_modal_projector", config.get("projector_bias", True)
    norm = NormStep(name=f"{module}.layer_norm", eps=1e-5)
    inner = config.get("projector_hidden_size", 2560)
    return ProjectorSpec(
        merge_factor=config.get("downsample_factor", 2),
        steps=(
            *((norm,) if config.get("projector_use_layernorm", True) else ()),
            LinearStep(name=f"{module}.linear_1", out_features=inner, has_bias=has_bias),
            ActivationStep(activation=config.get("projector_hidden_act", "gelu")),
            LinearStep(name=f"{module}.linear_2", out_features=width, has_bias=has_bias),
        ),
    )
