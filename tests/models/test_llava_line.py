"""Readers of LLaVA-NeXT, OneVision and Granite-Vision: what they fold, and what they refuse."""

from __future__ import annotations

import pytest

from pocketvlm.checkpoint.config import read_spec
from pocketvlm.errors import UnsupportedError
from pocketvlm.models.folds import Multiply
from pocketvlm.reference.random_models import tiny_config


def changed(name, section=None, **values):
    config = tiny_config(name)
    target = config if section is None else config[section]
    target.update(values)
    return config


def test_multipliers_are_folded_into_everything_that_enters_or_joins_the_stream():
    folds = {fold.target: fold for fold in read_spec(tiny_config("granite-vision")).folds}
    assert all(isinstance(fold, Multiply) for fold in folds.values())
    factors = {target: fold.factor for target, fold in folds.items()}
    block = "model.language_model.layers.1"
    assert factors["model.image_newline"] == 12.0
    assert factors["model.language_model.embed_tokens.weight"] == 12.0
    assert factors["model.multi_modal_projector.linear_2.bias"] == 12.0
    assert factors[f"{block}.self_attn.o_proj.weight"] == 0.22
    assert factors[f"{block}.mlp.down_proj.weight"] == 0.22
    assert factors[f"{block}.self_attn.q_proj.weight"] == pytest.approx(0.5 * 16**0.5)
    # The head is the table: its twelvefold logits are taken back before it.
    assert factors["model.language_model.norm.weight"] == pytest.approx(1 / 12)


def test_an_untied_head_is_not_multiplied():
    config = changed("granite-vision", tie_word_embeddings=False)
    config["text_config"]["tie_word_embeddings"] = False
    targets = {fold.target for fold in read_spec(config).folds}
    assert "model.language_model.norm.weight" not in targets


def test_a_decoder_without_multipliers_has_no_folds():
    assert read_spec(tiny_config("llava-next")).folds == ()


def test_features_of_several_blocks_stand_in_their_order():
    spec = read_spec(tiny_config("granite-vision"))
    assert spec.tower.earlier_features == (0, 2)
    assert spec.tower.feature_block == 3
    (first,) = (linear for linear in spec.linears() if linear.name.endswith("projector.linear_1"))
    assert first.in_features == 3 * spec.tower.hidden_size


@pytest.mark.parametrize("window", [None, 4096, 32768])
def test_windows_that_no_context_reaches_are_none(window):
    config = changed("llava-next", "text_config", sliding_window=window)
    assert read_spec(config).decoder.depth == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed("llava-next", "text_config", sliding_window=128), "sliding_window 128 is not"),
        (changed("llava-onevision", vision_aspect_ratio="anyres_max_4"), "'anyres_max_4' is not"),
        (changed("smolvlm", "text_config", model_type="granite"), "model_type 'granite' is not"),
        (changed("granite-vision", vision_feature_layer=[-1, -2]), "once and in their order"),
        (changed("llava-next", vision_feature_select_strategy="full"), "supported is 'default'"),
    ],
)
def test_what_cannot_be_computed_is_refused(config, message):
    with pytest.raises(UnsupportedError, match=message) as caught:
        read_spec(config)
    assert "\n" not in str(caught.value)
