"""LFM2-VL's configurations: which layers have what, how wide they are, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pocketvlm import DropTokens, PruneDepth, PruneWidth
from pocketvlm.checkpoint.config import read_spec
from pocketvlm.errors import CheckpointError, RecipeError, UnsupportedError
from pocketvlm.models.blocks import BlockSpec, ConvBlockSpec
from pocketvlm.reference.random_models import tiny_config
from pocketvlm.stages import PlanState


def changed(**text: Any) -> dict[str, Any]:
    config = tiny_config("lfm2-vl")
    return {**config, "text_config": {**config["text_config"], **text}}


def test_blocks_are_of_the_kinds_that_the_configuration_names():
    decoder = read_spec(tiny_config("lfm2-vl")).decoder
    kinds = [type(block) for block in decoder.blocks]
    assert kinds == [ConvBlockSpec, BlockSpec, ConvBlockSpec, ConvBlockSpec]
    assert decoder.attention_blocks == (1,)
    assert list(decoder.convolutions) == [0, 2, 3]
    assert decoder.attention(1).q_norm is not None
    with pytest.raises(ValueError, match="layers.0 has no attention"):
        decoder.attention(0)


def test_first_releases_name_the_layers_of_attention_alone():
    config = changed(full_attn_idxs=[1])
    del config["text_config"]["layer_types"]
    assert read_spec(config) == read_spec(tiny_config("lfm2-vl"))


@pytest.mark.parametrize("stated", [130, 6656, 12288, 96])
@pytest.mark.parametrize("multiplier", [1.0, 1.3])
@pytest.mark.parametrize("adjusts", [True, False])
def test_the_width_of_the_ffn_is_the_one_that_the_class_makes(stated, multiplier, adjusts):
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP

    text = {
        "intermediate_size": stated,
        "block_ffn_dim_multiplier": multiplier,
        "block_auto_adjust_ff_dim": adjusts,
    }
    config = changed(**text)
    with torch.device("meta"):
        stock = Lfm2MLP(Lfm2Config(**config["text_config"]))
    assert read_spec(config).decoder.ffn_size == stock.w1.out_features


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layer_types": ["conv"] * 4}, CheckpointError, "no layer of the decoder has attention"),
        ({"layer_types": ["conv", "full_attention"]}, CheckpointError, "layer_types"),
        (
            {"layer_types": ["conv", "full_attention", "conv", "sliding_attention"]},
            UnsupportedError,
            "must name conv or full_attention",
        ),
        ({"conv_L_cache": 1}, CheckpointError, "do not all see the same 2 rows or more"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
            UnsupportedError,
            "rope_type 'linear' is not supported",
        ),
    ],
)
def test_what_has_no_place_is_refused_in_one_line(change, error, message):
    with pytest.raises(error, match=message) as caught:
        read_spec(changed(**change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "stage", [PruneDepth(decoder_blocks=1), PruneWidth(ffn_ratio=0.5), DropTokens()]
)
def test_stages_that_count_on_attention_in_every_layer_say_so(stage):
    state = PlanState.of(read_spec(tiny_config("lfm2-vl")))
    with pytest.raises(RecipeError, match="3 of the decoder's 4 layers have a short convolution"):
        stage.plan(state)


def test_blocks_of_the_tower_are_removed_as_everywhere():
    state = PlanState.of(read_spec(tiny_config("lfm2-vl")))
    assert PruneDepth(tower_blocks=1).plan(state).spec.tower.depth == 2
