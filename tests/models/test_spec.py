from __future__ import annotations

import pytest

from pocketvlm.errors import CheckpointError, UnsupportedError
from pocketvlm.models.families.table import read_model_spec
from pocketvlm.reference.random_models import tiny_config
from pocketvlm.reference.shapes import load_shape


def test_every_linear_of_the_model_is_listed_with_its_shape(tiny_checkpoint):
    from pocketvlm.weights.modules import FormEmbedding, FormLinear

    spec = tiny_checkpoint.spec
    listed = {linear.name: linear for linear in spec.linears()}
    for name, module in tiny_checkpoint.model.named_modules():
        if not isinstance(module, FormLinear | FormEmbedding):
            continue
        if spec.decoder.tied_head and name == "lm_head":
            continue
        if name.startswith(spec.tower.stack) and name not in listed:
            assert int(name.removeprefix(spec.tower.stack).split(".")[1]) > spec.tower.feature_block
            continue
        linear = listed.pop(name)
        assert module.form.shape == (linear.out_features, linear.in_features)
        if isinstance(module, FormLinear):
            assert (module.bias is not None) == linear.has_bias
    assert not listed


def test_llava_stops_at_its_feature_layer():
    spec = read_model_spec(tiny_config("llava"))
    assert spec.tower.feature_block == 1
    assert spec.visual_tokens == 16
    assert spec.decoder.tied_head


def test_smolvlm_256m_has_the_published_counts():
    spec = read_model_spec(load_shape("smolvlm-256m").config)
    assert spec.visual_tokens == 64
    weights = sum(linear.out_features * linear.in_features for linear in spec.linears())
    assert weights == pytest.approx(256e6, rel=0.02)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "kosmos-2"}, UnsupportedError, "supported are llava, idefics3, smolvlm"),
        ({"vision_feature_layer": [-2, -3]}, UnsupportedError, "each once and in their order"),
        ({"vision_feature_layer": [0, -2]}, UnsupportedError, "each once and in their order"),
        ({"vision_feature_layer": -9}, UnsupportedError, "states of the 3 blocks"),
        ({"vision_feature_select_strategy": "full"}, UnsupportedError, "supported is 'default'"),
        ({"vision_config": {"model_type": "pixtral"}}, UnsupportedError, "clip_vision_model"),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        read_model_spec({**tiny_config("llava"), **change})


def test_a_missing_field_is_named():
    config = tiny_config("smolvlm")
    del config["text_config"]["hidden_size"]
    with pytest.raises(CheckpointError, match="'hidden_size'"):
        read_model_spec(config)
