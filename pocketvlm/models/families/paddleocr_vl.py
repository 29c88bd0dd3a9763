"""PaddleOCR-VL (arXiv 2510.14528): a SigLIP for pictures of any size and an ERNIE 4.5 decoder.

Patches have learned positions, resampled to the picture, and are turned by row and column as well.
They pass a second norm before two by two of them become a visual token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.families.clip import read_siglip
from pocketvlm.models.families.llama import read_llama
from pocketvlm.models.projector import ActivationStep, LinearStep, NormStep, ProjectorSpec
from pocketvlm.models.spec import ModelSpec, ProcessorSpec
from pocketvlm.models.tower import TowerSpec

__all__ = ["read_paddleocr_vl"]

_SIDE = 448


def read_paddleocr_vl(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json of this family.

    Raises:
        UnsupportedError: The decoder is another, or patches are turned in another way.
        KeyError: A field is missing.
    """
    vision, projector = config["vision_config"], "model.projector"
    tower, merge = _read_tower(vision), vision["spatial_merge_size"]
    decoder = read_llama(config, "model.language_model")
    return ModelSpec(
        family="paddleocr_vl",
        processor=ProcessorSpec(
            classes=("PaddleOCRVLProcessor",),
            counts_patches=False,
            stand_in="PaddleOCRVLProcessor",
            count_setting=None,
        ),
        model_type=config["model_type"],
        tower=tower,
        projector=ProjectorSpec(
            merge_factor=merge,
            patch_norm=NormStep(name=f"{projector}.pre_norm", eps=1e-5),
            steps=(
                LinearStep(
                    name=f"{projector}.linear_1",
                    out_features=tower.hidden_size * merge**2,
                    has_bias=True,
                ),
                ActivationStep(activation="gelu"),
                LinearStep(
                    name=f"{projector}.linear_2", out_features=decoder.hidden_size, has_bias=True
                ),
            ),
        ),
        decoder=decoder,
        image_token_id=config["image_token_id"],
        image_token="<|IMAGE_PLACEHOLDER|>",  # noqa: S106  (a token of text, not a secret)
        image_prefix="",
        image_suffix="",
    )


def _read_tower(vision: Mapping[str, Any]) -> TowerSpec:
    rope = vision.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") != "axial":
        raise UnsupportedError(
            f"config.json: vision_config rope_type {rope['rope_type']!r} is not supported; "
            "supported is 'axial'"
        )
    return replace(
        read_siglip(vision, "model.visual.vision_model", image_size=_SIDE),
        table_side=vision["image_size"] // vision["patch_size"],
        aligns_corners=False,
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
    )
