"""The pack-quantized layout of a layer: against a slow reader, and what it cannot hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.errors import CheckpointError, UnsupportedError
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.formats import (
    AffineSettings,
    CompressedTensorsLayout,
    compressed_tensors_config,
    from_compressed_tensors,
    to_compressed_tensors,
)
from tests.weights.formats.slow_readers import group_of, read_compressed_tensors
from tests.weights.formats.test_gptq import assert_equal, random_affine, settings_for


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([5, 16, 32, 48]),
    rows=st.sampled_from([1, 7, 32]),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_round_trip_keeps_every_code(bits, groups, group_size, rows, symmetric, seed) -> None:
    """Rows and columns need not fill words, and a zero point of 0 has a place."""
    form = random_affine(
        seed,
        bits=bits,
        group_size=group_size,
        rows=rows,
        columns=groups * group_size,
        symmetric=symmetric,
        lowest_zero=0,
    )
    found = from_compressed_tensors(
        "layer", to_compressed_tensors("layer", form), settings_for(form)
    )
    assert_equal(found, form)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size", "columns"), [(2, 16, 32), (3, 32, 64), (4, 24, 72), (8, 64, 64)]
)
def test_a_reader_of_the_definition_finds_the_same_weights(bits, group_size, columns, symmetric):
    form = random_affine(3, bits=bits, group_size=group_size, columns=columns, symmetric=symmetric)
    tensors = to_compressed_tensors("layer", form)
    config = compressed_tensors_config({"layer": form}, quantizer="a:1")
    dense = read_compressed_tensors(tensors, group_of(config, "layer"))
    assert np.array_equal(dense, form.dequantize().double().numpy())


def test_a_group_wider_than_its_row_is_a_row():
    form = random_affine(0, bits=4, group_size=128, columns=64)
    config = compressed_tensors_config({"a": form}, quantizer="a:1")
    assert group_of(config, "a")["strategy"] == "channel"
    found = CompressedTensorsLayout.from_config(config).read("a", to_compressed_tensors("a", form))
    assert torch.equal(found.dequantize(), form.dequantize())


def test_what_the_layout_cannot_hold_is_one_clear_line():
    short = random_affine(0, bits=4, group_size=48, columns=64)
    plain = random_affine(0, bits=4, group_size=32, symmetric=False)
    floats = AffineWeight.from_codes(
        plain.codes(),
        plain.scales,
        plain.zeros.to(torch.float16),
        bits=4,
        group_size=32,
        in_features=64,
    )
    for form, message in ((short, "64 columns do not divide"), (floats, "zero_point: integer")):
        with pytest.raises(UnsupportedError, match=message):
            to_compressed_tensors("layer", form)


def test_stored_tensors_that_contradict_their_settings_are_refused():
    form = random_affine(0, bits=4, group_size=32, symmetric=False)
    good, said = to_compressed_tensors("layer", form), settings_for(form)
    even = AffineSettings(bits=4, group_size=32, symmetric=True)
    wide = AffineSettings(bits=8, group_size=32, symmetric=False)
    uneven = AffineSettings(bits=4, group_size=33, symmetric=False)
    cases = [
        ({**good, "weight_g_idx": good["weight_shape"]}, said, UnsupportedError, "actorder"),
        ({**good, "lora_A": good["weight_scale"]}, said, CheckpointError, "lora_A"),
        (good, even, CheckpointError, "weight_zero_point has no place"),
        (good, wide, CheckpointError, "weight_packed"),
        (good, uneven, CheckpointError, "do not divide"),
        ({**good, "weight_shape": torch.tensor([32, 0])}, said, CheckpointError, "number of"),
        ({**good, "weight_shape": torch.tensor([31, 64])}, said, CheckpointError, "weight_packed"),
        ({**good, "weight_packed": good["weight_packed"].long()}, said, CheckpointError, "int64"),
        ({**good, "weight_zero_point": good["weight_packed"]}, said, CheckpointError, "zero_point"),
        (
            {**good, "weight_scale": good["weight_scale"].float() + 1e-6},
            said,
            CheckpointError,
            "not exact",
        ),
        *(
            ({k: v for k, v in good.items() if k != key}, said, CheckpointError, key)
            for key in good
        ),
    ]
    for tensors, settings_, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            from_compressed_tensors("layer", tensors, settings_)
        assert "\n" not in str(caught.value)


def test_groups_say_what_layers_share_and_are_read_back():
    forms = {
        "m.text.layers.1.fc1": random_affine(0, bits=4, group_size=32),
        "m.text.layers.2.fc1": random_affine(1, bits=4, group_size=32),
        "m.projector.linear": random_affine(2, bits=8, group_size=16, symmetric=False),
        "m.tower.fc1": None,
    }
    config = compressed_tensors_config(forms, quantizer="a:1")
    assert config["ignore"] == ["m.tower.fc1"]
    assert [len(group["targets"]) for group in config["config_groups"].values()] == [2, 1]
    layout = CompressedTensorsLayout.from_config(config)
    for name, form in forms.items():
        if form is not None:
            assert_equal(layout.read(name, to_compressed_tensors(name, form)), form)
    with pytest.raises(CheckpointError, match=r"no group .* targets m\.other"):
        layout.read("m.other", {})


def group(targets, **weights):
    said = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    return {"targets": targets, "weights": {**said, **weights}}


def config_of(*groups, **more):
    named = {f"group_{number}": one for number, one in enumerate(groups)}
    return {"format": "pack-quantized", "config_groups": named, **more}


def test_the_more_exact_target_decides():
    layout = CompressedTensorsLayout.from_config(
        config_of(
            group(["Linear"]),
            group(["re:.*tower"], num_bits=8),
            group(["m.tower.fc2"], strategy="channel", group_size=None),
            sparsity_config={"format": "dense"},
        )
    )
    forms = {
        "m.text.fc1": random_affine(0, bits=4, group_size=32),
        "m.tower.fc1": random_affine(1, bits=8, group_size=32),
        "m.tower.fc2": random_affine(2, bits=4, group_size=64),
    }
    for name, form in forms.items():
        assert_equal(layout.read(name, to_compressed_tensors(name, form)), form)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of(), "names no group"),
        (config_of([]), "must be an object"),
        (config_of(group(["Linear"]), format="nvfp4-pack-quantized"), "'nvfp4-pack-quantized'"),
        (config_of({**group(["Linear"]), "format": "int-quantized"}), "'int-quantized'"),
        (config_of(group("Linear")), "targets"),
        (config_of(group(["re:("])), "regular expression"),
        (config_of(group(["Linear"], num_bits=5)), "bits must be"),
        (config_of(group(["Linear"], group_size="x")), "group_size|not supported"),
        (config_of(group(["Linear"], type="float")), "'float'"),
        (config_of(group(["Linear"], strategy="tensor")), "'tensor'"),
        (config_of({**group(["Linear"]), "input_activations": {"num_bits": 8}}), "input_activa"),
        (config_of(group(["Linear"]), kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (config_of(group(["Linear"]), transform_config={"config_groups": 1}), "transform_config"),
        (config_of(group(["Linear"]), sparsity_config={"format": "2:4"}), "sparsity_config"),
    ],
)
def test_a_configuration_without_meaning_here_is_one_clear_line(config, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        CompressedTensorsLayout.from_config(config)
    assert "\n" not in str(caught.value)
