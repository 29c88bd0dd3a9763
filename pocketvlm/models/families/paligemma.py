"""PaliGemma (arXiv 2407.07726) and PaliGemma 2 (2412.03555): SigLIP, one linear, Gemma or Gemma 2.

Picture and question are a prefix whose rows all see each other; the answer alone is causal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.families.clip import read_siglip
from pocketvlm.models.families.gemma import norm_folds, read_gemma
from pocketvlm.models.projector import LinearStep, ProjectorSpec
from pocketvlm.models.spec import ModelSpec, ProcessorSpec

__all__ = ["read_paligemma"]

_PLACES = (*(f"<loc{n:0>4}>" for n in range(1024)), *(f"<seg{n:0>3}>" for n in range(128)))
_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{ raise_exception('this model takes no system prompt') }}
{%- endif -%}
{%- if message['content'] is not string -%}
{%- for part in message['content'] if part['type'] == 'image' -%}<image>{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- set content = messages[-1]['content'] -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}"""
"""Every picture of a conversation, then its last question: the model knows no turns."""


def read_paligemma(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json of this family.

    Raises:
        UnsupportedError: The decoder is another.
        KeyError: A field is missing.
    """
    text, vision = config["text_config"], config["vision_config"]
    decoder = read_gemma(
        config, "model.language_model", kinds=("gemma", "gemma2"), mutual_rows="prompt"
    )
    for derived in ("num_image_tokens", "use_bidirectional_attention"):
        text.get(derived)  # set by the class, whatever a file says
    for unused in ("vocab_size", "hidden_size"):
        config.get(unused)  # the decoder's own count
    if config["projection_dim"] != decoder.hidden_size:
        raise UnsupportedError(
            f"config.json: projection_dim {config['projection_dim']} is not supported; supported "
            f"is text_config.hidden_size, {decoder.hidden_size}"
        )
    return ModelSpec(
        family="paligemma",
        processor=ProcessorSpec(
            classes=("PaliGemmaProcessor",),
            counts_patches=False,
            count_setting="image_seq_length",
            default_count=None,
            added_words=_PLACES,
            adds_ends=False,
        ),
        model_type=config["model_type"],
        tower=read_siglip(vision, "model.vision_tower"),
        projector=ProjectorSpec(
            merge_factor=1,
            steps=(
                LinearStep(
                    name="model.multi_modal_projector.linear",
                    out_features=decoder.hidden_size,
                    has_bias=True,
                ),
            ),
        ),
        decoder=decoder,
        image_token_id=config["image_token_index"],
        image_token="<image>",  # noqa: S106  (a token of text, not a secret)
        image_prefix="",
        image_suffix="",
        has_prefix_prompt=True,
        chat_template=_TEMPLATE,
        folds=norm_folds(decoder),
    )
