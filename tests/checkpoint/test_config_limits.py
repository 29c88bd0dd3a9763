from __future__ import annotations

import json
import time

import pytest

from pocketvlm.checkpoint.config import read_config, read_spec
from pocketvlm.errors import CheckpointError
from pocketvlm.reference.random_models import tiny_config


def edited(path, value, family="llava"):
    config = tiny_config(family)
    *parents, last = path.split(".")
    place = config
    for step in parents:
        place = place[step]
    place[last] = value
    return config


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{part}_config.{key}", value)
        for part, keys in (
            ("text", ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads")),
            ("vision", ("num_hidden_layers", "image_size", "patch_size", "intermediate_size")),
        )
        for key in keys
        for value in (0, -1, 10**12, 10**30, 2.0, True, "64", float("nan"), {}, [[]])
    ]
    + [
        ("text_config", []),
        ("vision_config", "clip"),
        ("text_config.rope_parameters", [1]),
        ("text_config.rope_parameters.rope_theta", "x"),
        ("text_config.rope_parameters.rope_theta", -1.0),
        ("text_config.rope_parameters.rope_theta", float("inf")),
        ("text_config.rms_norm_eps", "x"),
        ("text_config.rms_norm_eps", -1e-5),
        ("text_config.num_key_value_heads", 3),
        ("text_config.head_dim", 15),
        ("vision_config.num_attention_heads", 7),
        ("vision_config.patch_size", 4000),
        ("text_config.hidden_act", ["silu"]),
        ("tie_word_embeddings", "yes"),
        ("model_type", ["llava"]),
    ],
)
def test_a_size_that_no_model_has_is_refused_at_once(tmp_path, family, path, value):
    (tmp_path / "config.json").write_text(json.dumps(edited(path, value, family)))
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"config\.json: ") as caught:
        read_spec(read_config(tmp_path))
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)


def test_an_image_token_is_an_id(tmp_path):
    for value in ("<image>", -1, 2**40, None, [1]):
        config = tiny_config("smolvlm") | {"image_token_id": value}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"config\.json: "):
            read_spec(read_config(tmp_path))
