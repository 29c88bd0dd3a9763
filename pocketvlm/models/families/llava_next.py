"""LLaVA-NeXT (arXiv 2310.03744) and OneVision (2408.03326): LLaVA, pictures of any resolution.

Granite-Vision (2502.09927) is of the first kind, with features of several blocks of a SigLIP tower
and a Granite decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.families.granite import granite_folds
from pocketvlm.models.families.llava import read_llava
from pocketvlm.models.images.tilings.anyres import Anyres
from pocketvlm.models.spec import ModelSpec, ProcessorSpec

__all__ = ["read_llava_next"]

_PROCESSORS = {
    "llava_next": ProcessorSpec(classes=("LlavaNextProcessor",), counts_patches=True),
    # This class wants packages for videos before it looks at a picture.
    "llava_onevision": ProcessorSpec(
        classes=("LlavaOnevisionProcessor",),
        counts_patches=False,
        stand_in="LlavaOnevisionProcessor",
        count_setting="num_image_tokens",
        default_count=None,
    ),
}
_MOST_AREA = 9
_RATIO = f"anyres_max_{_MOST_AREA}"


def read_llava_next(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json of this family.

    Raises:
        UnsupportedError: Tower or decoder are others, or features are taken in another way.
        KeyError: A field is missing.
    """
    model_type = config["model_type"]
    is_onevision = model_type == "llava_onevision"
    if is_onevision and config.get("vision_aspect_ratio", _RATIO) != _RATIO:
        raise UnsupportedError(
            f"config.json: vision_aspect_ratio {config['vision_aspect_ratio']!r} is not supported; "
            f"supported is {_RATIO!r}"
        )
    config.get("video_token_index")  # read: no prompt holds it
    spec = read_llava(config)
    spec = replace(
        spec,
        family="llava_next",
        processor=_PROCESSORS[model_type],
        tiling=Anyres(
            side=spec.tower.height,
            resolutions=tuple((height, width) for height, width in config["image_grid_pinpoints"]),
            most_area=_MOST_AREA if is_onevision else None,
            cuts_several=not is_onevision,
        ),
        line_break="model.image_newline",
    )
    return replace(spec, folds=granite_folds(config["text_config"], spec))
