"""What config.json of an InternVL says of its tower, and what of it is not supported."""

from __future__ import annotations

from typing import Any

import pytest

from pocketvlm.errors import UnsupportedError
from pocketvlm.models.families.table import read_model_spec
from pocketvlm.models.folds import ScaleRows
from pocketvlm.reference.random_models import tiny_config


def test_every_sublayer_of_the_tower_takes_its_scale():
    spec = read_model_spec(tiny_config("internvl3"))
    scaled = {fold.target for fold in spec.folds if isinstance(fold, ScaleRows)}
    outputs = {
        linear.name for linear in spec.linears() if linear.role in ("projection_layer", "fc2")
    }
    assert scaled == {f"{name}.{kind}" for name in outputs for kind in ("weight", "bias")}
    assert len(outputs) == 2 * spec.tower.depth


def test_the_last_norm_is_there_where_nothing_is_pooled():
    assert read_model_spec(tiny_config("internvl3")).tower.feature_norm is None
    norm = read_model_spec(tiny_config("internvl3.5")).tower.feature_norm
    assert norm == "model.vision_tower.layernorm"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("vision_config", "use_qk_norm", True),
        ("vision_config", "norm_type", "rms_norm"),
        ("vision_config", "use_mask_token", True),
        ("vision_config", "use_absolute_position_embeddings", False),
        ("vision_config", "image_size", [32, 64]),
        ("", "vision_feature_layer", -2),
        ("", "vision_feature_select_strategy", "full"),
        ("", "downsample_ratio", 0.3),
    ],
)
def test_what_no_graph_computes_is_refused_by_its_key(section: str, key: str, value: Any):
    config = tiny_config("internvl3")
    (config[section] if section else config)[key] = value
    words = {"image_size": "squares", "vision_feature_select_strategy": "strategy 'full'"}
    with pytest.raises(UnsupportedError, match=words.get(key, key)) as refused:
        read_model_spec(config)
    assert "\n" not in str(refused.value)
