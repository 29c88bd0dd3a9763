"""A model that cannot be read is refused with what would work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pocketvlm.checkpoint import read_config
from pocketvlm.checkpoint.config import read_spec
from pocketvlm.errors import CheckpointError, UnsupportedError
from pocketvlm.models.families.table import FAMILIES, read_model_spec
from pocketvlm.models.families.unsupported import _CONVERTED, advise
from pocketvlm.reference.random_models import tiny_config


def test_an_unknown_type_is_told_the_nearest():
    with pytest.raises(UnsupportedError) as refused:
        read_model_spec({"model_type": "smolvlm2"})
    text = str(refused.value)
    assert text.startswith("config.json: model_type 'smolvlm2' is not supported; ")
    assert "the nearest supported are smolvlm; all supported are llava" in text
    assert all(name in text for name in FAMILIES)
    assert "\n" not in text


def test_a_type_that_resembles_none_is_told_all():
    with pytest.raises(UnsupportedError, match="'kosmos-2.5' is not supported; supported are "):
        read_model_spec({"model_type": "kosmos-2.5"})
    with pytest.raises(UnsupportedError, match="None is not supported; supported are "):
        read_model_spec({})


SUPPORTED = ("llava", "llava_next", "llava_onevision", "internvl", "fast_vlm")


@pytest.mark.parametrize("name", _CONVERTED)
def test_what_has_its_own_code_is_told_the_converted_repository(name: str):
    config = {"model_type": "llava", "architectures": [name]} if name[0].isupper() else {}
    advice = advise({"model_type": name, **config}, SUPPORTED)
    assert advice is not None
    assert _CONVERTED[name].repository in advice
    assert _CONVERTED[name].model_type in SUPPORTED


def test_a_conversion_to_a_family_that_is_not_supported_is_not_recommended():
    assert advise({"model_type": "internvl_chat"}, ("llava",)) is None


@pytest.mark.parametrize("model_type", FAMILIES)
def test_stock_models_of_a_supported_type_are_not_advised(model_type: str):
    assert advise({"model_type": model_type, "architectures": None}, FAMILIES) is None


def test_the_first_llava_is_told_apart_from_the_stock_one_by_its_class():
    """Both say `llava`; the weights of the first would be missed one by one otherwise."""
    config = {**tiny_config("llava"), "architectures": ["LlavaLlamaForCausalLM"]}
    for read in (read_spec, read_model_spec):
        with pytest.raises(
            UnsupportedError, match=r"class 'LlavaLlamaForCausalLM'.*llava-1.5-7b-hf"
        ):
            read(config)


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_remote_code_is_refused_with_the_repository_to_use(tmp_path: Path):
    code = {"AutoConfig": "configuration_llava.LlavaConfig"}
    folder = write_config(tmp_path, {"model_type": "llava_llama", "auto_map": code})
    with pytest.raises(CheckpointError, match="never run; use a repository.*llava-1.5-7b-hf"):
        read_config(folder)


def test_remote_code_of_a_family_that_nobody_converted(tmp_path: Path):
    folder = write_config(tmp_path, {"model_type": "moondream1", "auto_map": {"AutoConfig": "a.B"}})
    with pytest.raises(
        CheckpointError, match="never run; no conversion of .*; supported are llava"
    ):
        read_config(folder)
