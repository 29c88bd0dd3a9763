"""Gemma 3 (arXiv 2503.19786): SigLIP, an average of patches, a norm, one linear, Gemma 3's decoder.

The rows of a picture see each other; everything else is causal.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.families.clip import read_siglip
from pocketvlm.models.families.gemma import norm_folds, read_gemma
from pocketvlm.models.folds import AddOne, Transpose
from pocketvlm.models.projector import LinearStep, NormStep, ProjectorSpec
from pocketvlm.models.spec import ModelSpec, ProcessorSpec

__all__ = ["read_gemma3"]

_BEGIN, _END, _ROW = "<start_of_image>", "<end_of_image>", "<image_soft_token>"


def read_gemma3(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json of this family.

    Raises:
        UnsupportedError: The decoder is another, or a picture does not fit it.
        KeyError: A field is missing.
    """
    decoder = read_gemma(config, "model.language_model", kinds=("gemma3_text",), mutual_rows="tile")
    tower = read_siglip(config["vision_config"], "model.vision_tower")
    rows = config["mm_tokens_per_image"]
    side = isqrt(rows)
    if side**2 != rows or side < 1 or tower.rows % side:
        raise UnsupportedError(
            f"config.json: mm_tokens_per_image {rows} is not supported; supported are squares "
            f"whose side divides {tower.rows}, the patches of a side"
        )
    if decoder.sliding is not None and decoder.sliding.window < rows:
        raise UnsupportedError(
            f"config.json: text_config.sliding_window {decoder.sliding.window} is not supported; "
            f"supported is at least mm_tokens_per_image, {rows}"
        )
    for token in ("boi_token_index", "eoi_token_index"):
        config.get(token)  # the tokenizer names both
    module = "model.multi_modal_projector"
    norm, linear = f"{module}.mm_soft_emb_norm", f"{module}.mm_input_projection"
    return ModelSpec(
        family="gemma3",
        processor=ProcessorSpec(
            classes=("Gemma3Processor",),
            counts_patches=False,
            count_setting="image_seq_length",
            default_count=256,
            named_tokens={"image_token": _ROW, "boi_token": _BEGIN, "eoi_token": _END},
        ),
        model_type=config["model_type"],
        tower=tower,
        projector=ProjectorSpec(
            merge_factor=tower.rows // side,
            merge="average",
            steps=(
                NormStep(name=norm, eps=tower.norm_eps, has_bias=False),
                LinearStep(name=linear, out_features=decoder.hidden_size, has_bias=False),
            ),
        ),
        decoder=decoder,
        image_token_id=config["image_token_index"],
        image_token=_ROW,
        image_prefix=f"\n\n{_BEGIN}",
        image_suffix=f"{_END}\n\n",
        image_mark=_BEGIN,
        folds=(
            *norm_folds(decoder),
            AddOne(target=f"{norm}.weight"),
            Transpose(source=f"{linear}_weight", target=f"{linear}.weight"),
        ),
    )
