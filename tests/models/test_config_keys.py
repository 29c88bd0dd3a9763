"""A key of config.json is read, cannot matter, or is refused by its path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.checkpoint.config import parse_config, read_spec
from pocketvlm.errors import UnsupportedError
from pocketvlm.models.config_keys import WITHOUT_EFFECT
from pocketvlm.models.families.table import read_model_spec
from pocketvlm.reference.random_models import tiny_config, write_tiny_model

FAMILIES = ("llava", "smolvlm", "internvl3.5", "paligemma2", "gemma3")
WITHOUT_CALLS = ("qwen3-vl", "glm-ocr", "paddleocr-vl")
"""Families whose keys are looked at alone: their models take more than ids and one picture."""
REFUSED = {"gemma3": {"text_config.use_bidirectional_attention"}}
"""Numbers and switches of the classes that no field holds yet."""


@pytest.fixture(scope="module")
def tiny_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("keys")
    for family in FAMILIES:
        write_tiny_model(family, root / family)
    return {family: root / family for family in FAMILIES}


def changed(value: Any) -> Any:
    """Another value of the same type; `None` where there is none to be thought of."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value / 2 + 0.25  # some are checked to be shares
    if isinstance(value, int):
        return value + 1
    return None


def levels(config: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A configuration object and those in it, by path."""
    yield (), config
    for key in type(config).sub_configs:
        yield (key,), getattr(config, key)


def with_value(config: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = path
    own = config.get(first) or {}
    return {**config, first: with_value(own, tuple(rest), value) if rest else value}


@pytest.mark.parametrize("family", [*FAMILIES, *WITHOUT_CALLS])
def test_every_key_of_the_classes_is_read_or_refused_or_listed(family: str):
    config, used = tiny_config(family), set[str]()
    parsed = parse_config(config)
    read_model_spec(parsed.to_dict(), used)
    refused = set()
    for path, own in levels(parsed):
        for key, default in type(own)().to_dict().items():
            place = (*path, key)
            value = changed(default)
            if key in WITHOUT_EFFECT or ".".join(place) in used or value is None:
                continue
            with pytest.raises(UnsupportedError, match=rf"config.json: {'.'.join(place)} is "):
                read_spec(with_value(config, place, value))
            refused.add(".".join(place))
    assert refused == REFUSED.get(family, set())  # all else is read or listed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("text_config", "rope_parameters", "partial_rotary_factor"), 0.5),
        (("text_config", "rope_parameters", "factor"), 2.0),
    ],
)
def test_a_key_that_no_field_holds_is_refused_by_its_path(path: tuple[str, ...], value: float):
    config = with_value(tiny_config("smolvlm"), path, value)
    with pytest.raises(UnsupportedError) as caught:
        read_spec(config)
    assert f"config.json: {'.'.join(path)} is {value!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_that_the_library_added_is_refused_until_a_field_holds_it(monkeypatch):
    from transformers import LlamaConfig

    monkeypatch.setattr(LlamaConfig, "to_dict", _with_new_key(LlamaConfig.to_dict))
    read_spec(tiny_config("smolvlm"))
    config = with_value(tiny_config("smolvlm"), ("text_config", "new_scale"), 2.0)
    with pytest.raises(UnsupportedError, match="text_config.new_scale is 2.0"):
        read_spec(config)


def _with_new_key(stock: Any) -> Any:
    return lambda self: {"new_scale": 1.0, **stock(self)}


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_are_said_to_have_no_effect_have_none(family: str, tmp_path: Path):
    from transformers import AutoModelForImageTextToText

    write_tiny_model(family, tmp_path / family)
    checkpoint, stock = Checkpoint.load(tmp_path / family), _stock(tmp_path / family)
    weights = stock.state_dict()
    config, used = tiny_config(family), set[str]()
    read_model_spec(parse_config(config).to_dict(), used)
    for path, own in levels(parse_config(config)):
        for key, default in own.to_dict().items():
            if ".".join((*path, key)) in used:
                continue
            # These say how a model is stored or called, and cannot be set to anything.
            if key in {"return_dict", "is_encoder_decoder", "output_attentions", "use_cache"}:
                continue
            if key in WITHOUT_EFFECT and changed(default) is not None:
                config = with_value(config, (*path, key), changed(default))
    torch.manual_seed(0)
    other = AutoModelForImageTextToText.from_config(parse_config(config)).eval()
    other.load_state_dict(weights, strict=False)
    spec = checkpoint.spec
    side = spec.tower.height
    pixels = torch.randn(1, 3, side, side)
    ids = torch.tensor([[1, 5, *[spec.image_token_id] * spec.visual_tokens, 7, 8]])
    extra = {"pixel_values": pixels[None] if family == "smolvlm" else pixels}
    with torch.inference_mode():
        logits = [model(input_ids=ids, **extra).logits for model in (stock, other)]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=0)


def _stock(path: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()


def test_keys_that_the_library_does_not_know_are_told_and_ignored(tmp_path):
    from pocketvlm.checkpoint.folder import read_model_folder
    from pocketvlm.reference.random_models import write_random_model

    config = with_value(tiny_config("smolvlm"), ("text_config", "unsloth_fixed"), value=True)
    config["qk_layer_norms"] = False
    write_random_model(config, tmp_path)
    notes = read_model_folder(tmp_path).notes
    assert any("qk_layer_norms" in note and "text_config.unsloth_fixed" in note for note in notes)
