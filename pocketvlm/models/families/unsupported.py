"""What to do with a model that no reader takes: a converted repository, or the nearest families.

Many models were first published with their own code, and converted to the library's classes later.
A config.json tells which of them it is by its `model_type`, or by its class where that type is now
a stock model's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

__all__ = ["advise", "classes"]


@dataclass(frozen=True, kw_only=True)
class _Converted:
    """A repository with the same weights in the library's classes.

    Attributes:
        model_type: What its config.json says.
        repository: Its id, or that of one among several.
    """

    model_type: str
    repository: str


_LLAVA = _Converted(model_type="llava", repository="llava-hf/llava-1.5-7b-hf")
_LLAVA_MISTRAL = _Converted(model_type="llava_next", repository="llava-hf/llava-v1.6-mistral-7b-hf")
_LLAVA_QWEN = _Converted(
    model_type="llava_onevision", repository="llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
)
_INTERNVL = _Converted(model_type="internvl", repository="OpenGVLab/InternVL3-1B-hf")
_FASTVLM = _Converted(model_type="fast_vlm", repository="KamilaMila/FastVLM-0.5B")

_CONVERTED: Mapping[str, _Converted] = {
    "internvl_chat": _INTERNVL,
    "InternVLChatModel": _INTERNVL,
    "llava_llama": _LLAVA,
    "LlavaLlamaForCausalLM": _LLAVA,
    "llava_mistral": _LLAVA_MISTRAL,
    "LlavaMistralForCausalLM": _LLAVA_MISTRAL,
    "llava_qwen": _LLAVA_QWEN,
    "LlavaQwenForCausalLM": _LLAVA_QWEN,
    "llava_qwen2": _FASTVLM,
    "LlavaQwen2ForCausalLM": _FASTVLM,
}
"""Converted repositories by `model_type`, and by class, of what was published first."""


def advise(config: Mapping[str, Any], supported: Collection[str]) -> str | None:
    """What somebody with this config.json can do, as half a sentence.

    Args:
        config: Its content.
        supported: Model types that can be read.

    Returns:
        The converted repository where its family is supported, else the nearest supported types;
        `None` where neither is known, and for a stock model of a supported type.
    """
    model_type = str(config.get("model_type"))
    found = next(
        (_CONVERTED[name] for name in (model_type, *classes(config)) if name in _CONVERTED), None
    )
    if found is not None and found.model_type in supported:
        return (
            f"use a repository that is converted to stock transformers classes, such as "
            f"{found.repository} (model_type {found.model_type!r})"
        )
    near = [] if model_type in supported else get_close_matches(model_type, supported)
    return f"the nearest supported are {', '.join(near)}" if near else None


def classes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Classes that a config.json names."""
    found = config.get("architectures")
    return tuple(str(name) for name in found) if isinstance(found, list) else ()
