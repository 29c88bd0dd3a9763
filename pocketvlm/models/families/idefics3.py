"""Idefics3 (arXiv 2408.12637) and SmolVLM (2504.05299): SigLIP, pixel shuffle, a Llama decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketvlm.models.families.clip import read_siglip
from pocketvlm.models.families.llama import read_llama
from pocketvlm.models.projector import LinearStep, ProjectorSpec
from pocketvlm.models.spec import ModelSpec, ProcessorSpec

__all__ = ["read_idefics3"]

_BOUNDARY, _WHOLE = "<fake_token_around_image>", "<global-img>"
_NAMED = {"fake_image_token": _BOUNDARY, "global_image_token": _WHOLE}
_PROCESSORS = {
    "idefics3": ProcessorSpec(
        classes=("Idefics3Processor", "SmolVLMProcessor"),
        counts_patches=False,
        named_tokens=_NAMED,
    ),
    # SmolVLM's class wants packages for videos before it looks at a picture.
    "smolvlm": ProcessorSpec(
        classes=("SmolVLMProcessor", "Idefics3Processor"),
        counts_patches=False,
        stand_in="Idefics3Processor",
        named_tokens=_NAMED,
    ),
}


def read_idefics3(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json of this family.

    Raises:
        UnsupportedError: The decoder is another.
        KeyError: A field is missing.
    """
    decoder = read_llama(config, "model.text_model")
    return ModelSpec(
        family="idefics3",
        processor=_PROCESSORS[config["model_type"]],
        model_type=config["model_type"],
        tower=read_siglip(config["vision_config"], "model.vision_model"),
        projector=ProjectorSpec(
            merge_factor=config["scale_factor"],
            steps=(
                LinearStep(
                    name="model.connector.modality_projection.proj",
                    out_features=decoder.hidden_size,
                    has_bias=False,
                ),
            ),
        ),
        decoder=decoder,
        image_token_id=config["image_token_id"],
        image_token="<image>",  # noqa: S106  (a token of text, not a secret)
        image_prefix=f"{_BOUNDARY}{_WHOLE}",
        image_suffix=_BOUNDARY,
        tile_marker=f"{_BOUNDARY}<row_{{row}}_col_{{column}}>",
    )
