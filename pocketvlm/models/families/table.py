"""The table of families, and the one way from a config.json to a `ModelSpec`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from pocketvlm.errors import CheckpointError, UnsupportedError
from pocketvlm.json_io import decode
from pocketvlm.models.config_keys import ReadConfig
from pocketvlm.models.families.gemma3 import read_gemma3
from pocketvlm.models.families.glm_ocr import read_glm_ocr
from pocketvlm.models.families.idefics3 import read_idefics3
from pocketvlm.models.families.internvl import read_internvl
from pocketvlm.models.families.lfm2_vl import read_lfm2_vl
from pocketvlm.models.families.llava import read_llava
from pocketvlm.models.families.llava_next import read_llava_next
from pocketvlm.models.families.paddleocr_vl import read_paddleocr_vl
from pocketvlm.models.families.paligemma import read_paligemma
from pocketvlm.models.families.qwen_vl import read_qwen_vl
from pocketvlm.models.families.unsupported import advise, classes
from pocketvlm.models.spec import ModelSpec

__all__ = ["FAMILIES", "read_model_spec", "supported_families"]

FAMILIES: Mapping[str, Callable[[Mapping[str, Any]], ModelSpec]] = {
    "llava": read_llava,
    "idefics3": read_idefics3,
    "smolvlm": read_idefics3,
    "internvl": read_internvl,
    "qwen2_vl": read_qwen_vl,
    "qwen2_5_vl": read_qwen_vl,
    "qwen3_vl": read_qwen_vl,
    "glm_ocr": read_glm_ocr,
    "paddleocr_vl": read_paddleocr_vl,
    "lfm2_vl": read_lfm2_vl,
    "paligemma": read_paligemma,
    "gemma3": read_gemma3,
    "llava_next": read_llava_next,
    "llava_onevision": read_llava_next,
}
"""Readers by `model_type` of config.json."""


def supported_families() -> tuple[str, ...]:
    """Values of `model_type` that can be loaded."""
    return tuple(FAMILIES)


def read_model_spec(config: Mapping[str, Any], used: set[str] | None = None) -> ModelSpec:
    """Reads a spec from the content of a config.json.

    Args:
        config: The content.
        used: Gets the paths of all keys that the reader asked for.

    Raises:
        UnsupportedError: The family, or an option of it, is not supported.
        CheckpointError: The config lacks a field that its family needs, or a field has a type
            or value that no model of the family can have.
    """
    model_type = config.get("model_type")
    reader = FAMILIES.get(str(model_type))
    advice = advise(config, FAMILIES)
    if reader is None or advice is not None:
        found = f"model_type {model_type!r}" if reader is None else f"class {classes(config)[0]!r}"
        raise UnsupportedError(
            f"config.json: {found} is not supported; {f'{advice}; all ' if advice else ''}"
            f"supported are {', '.join(supported_families())}"
        )
    try:
        # Through `decode`: what the reader took from anybody's JSON has the types it says.
        spec = decode(
            ModelSpec, asdict(reader(ReadConfig(config, set() if used is None else used)))
        )
    except KeyError as error:
        raise CheckpointError(
            f"config.json: field {error.args[0]!r}, which {model_type} needs, is missing"
        ) from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"config.json: cannot be understood: {error}") from error
    spec.check()
    return spec
