"""The GPTQ layout of a layer: against a slow reader, both versions, and what it cannot hold."""

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
    GptqLayout,
    from_gptq,
    gptq_config,
    to_gptq,
)
from tests.weights.formats.slow_readers import read_gptq, settings_of


def random_affine(
    seed: int,
    *,
    bits: int,
    group_size: int,
    rows: int = 32,
    columns: int = 64,
    symmetric: bool = True,
    lowest_zero: int = 1,
) -> AffineWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 1 << bits, (rows, groups * group_size), generator=generator)
    scales = (torch.rand(rows, groups, generator=generator) + 0.01).to(torch.float16)
    zeros = torch.randint(lowest_zero, 1 << bits, (rows, groups), generator=generator)
    if symmetric:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    padding = groups * group_size - columns
    if padding:
        codes[:, columns:] = zeros[:, -1:]
    return AffineWeight.from_codes(
        codes,
        scales,
        None if symmetric else zeros,
        bits=bits,
        group_size=group_size,
        in_features=columns,
    )


def told_settings(bits: int, group_size: int) -> AffineSettings:
    return AffineSettings(bits=bits, group_size=group_size, symmetric=True)


def settings_for(form: AffineWeight) -> AffineSettings:
    return AffineSettings(bits=form.bits, group_size=form.group_size, symmetric=form.zeros is None)


def assert_equal(found: AffineWeight, form: AffineWeight) -> None:
    assert (found.bits, found.group_size, found.shape) == (form.bits, form.group_size, form.shape)
    assert torch.equal(found.codes(), form.codes())
    assert torch.equal(found.scales, form.scales)
    assert torch.equal(found.zero_points(), form.zero_points())
    assert (found.zeros is None) == (form.zeros is None)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([16, 32, 48, 64, 128]),
    columns=st.sampled_from([32, 64, 96]),
    rows=st.sampled_from([32, 64]),
    symmetric=st.booleans(),
    version=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_a_round_trip_keeps_every_code(
    bits, group_size, columns, rows, symmetric, version, seed
) -> None:
    form = random_affine(
        seed,
        bits=bits,
        group_size=group_size,
        rows=rows,
        columns=columns,
        symmetric=symmetric,
        lowest_zero=1 if version == 1 else 0,
    )
    tensors = to_gptq("layer", form, version=version)
    assert_equal(from_gptq("layer", tensors, settings_for(form), version=version), form)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size", "columns"), [(2, 16, 32), (3, 32, 64), (4, 24, 64), (8, 64, 64)]
)
def test_a_reader_of_the_definition_finds_the_same_weights(
    bits, group_size, columns, symmetric, version
) -> None:
    form = random_affine(3, bits=bits, group_size=group_size, columns=columns, symmetric=symmetric)
    tensors = to_gptq("layer", form, version=version)
    assert tensors["qweight"].shape == (columns * bits // 32, 32)
    assert tensors["qzeros"].shape == (form.groups, bits)
    dense = read_gptq(tensors, bits, version)
    assert np.array_equal(dense, form.dequantize().double().numpy())


@pytest.mark.parametrize(
    ("bits", "first", "second"),
    [(2, 0x55555555, 0xAAAAAAAA), (4, 0x77777777, 0x88888888), (8, 0x7F7F7F7F, 0x80808080)],
)
def test_zero_words_of_the_symmetric_grid_are_the_ones_that_readers_know(bits, first, second):
    form = random_affine(0, bits=bits, group_size=32)
    for version, word in ((1, first), (2, second)):
        zeros = to_gptq("layer", form, version=version)["qzeros"].numpy().view(np.uint32)
        assert (zeros == word).all()


def test_a_v2_checkpoint_read_as_v1_is_off_by_one_code():
    """The trap of readers that look at no version: every weight moves by a scale."""
    form = random_affine(0, bits=4, group_size=32)
    wrong = read_gptq(to_gptq("layer", form, version=2), 4, version=1)
    scales = form.scales.double().numpy().repeat(32, axis=1)
    assert np.allclose(form.dequantize().double().numpy() - wrong, scales)


def test_three_bit_codes_straddle_words():
    codes = torch.zeros(32, 32, dtype=torch.int64)
    codes[0, 10] = 0b110  # bits 30 to 32: two in the first word, one in the second
    form = AffineWeight.from_codes(
        codes, torch.ones(32, 1), None, bits=3, group_size=32, in_features=32
    )
    words = to_gptq("layer", form, version=2)["qweight"][:, 0].numpy().view(np.uint32)
    assert words.tolist() == [0b10 << 30, 1, 0]


def test_v1_refuses_a_zero_point_of_zero_and_v2_takes_it():
    form = random_affine(1, bits=4, group_size=32, symmetric=False, lowest_zero=0)
    assert int(form.zero_points().min()) == 0
    with pytest.raises(UnsupportedError, match="gptq_v2"):
        to_gptq("layer", form, version=1)
    found = from_gptq("layer", to_gptq("layer", form, version=2), settings_for(form), version=2)
    assert_equal(found, form)


def test_what_the_layout_cannot_hold_is_refused_by_name():
    codes = torch.zeros(32, 64, dtype=torch.int64)
    scales = torch.ones(32, 2)
    shape = {"group_size": 32, "in_features": 64}
    between = AffineWeight.from_codes(
        codes, scales, torch.full((32, 2), 7.5, dtype=torch.float16), bits=4, **shape
    )
    narrow = random_affine(0, bits=4, group_size=32, rows=12)
    odd = random_affine(0, bits=3, group_size=8, columns=40)
    for form, message in (
        (between, "float zero points"),
        (narrow, "out_features 12"),
        (odd, "in_features 40"),
    ):
        with pytest.raises(UnsupportedError, match=f"block.fc1: .*{message}"):
            to_gptq("block.fc1", form, version=2)


def test_stored_tensors_that_contradict_their_settings_are_refused():
    form = random_affine(0, bits=4, group_size=32, symmetric=False)
    good = to_gptq("layer", form, version=1)
    told = settings_for(form)
    shuffled = good["g_idx"].flip(0)
    last = torch.full_like(good["qzeros"], -1)
    cases = [
        ({**good, "g_idx": shuffled}, told, UnsupportedError, "desc_act"),
        ({**good, "qzeros": last}, told, UnsupportedError, "gptq_v2"),
        ({**good, "lora_A": good["scales"]}, told, CheckpointError, "lora_A"),
        ({"qweight": good["qweight"]}, told, CheckpointError, "qzeros"),
        (good, told_settings(4, 16), CheckpointError, "group size"),
        (good, told_settings(2, 32), CheckpointError, "qweight"),
        (
            {**good, "scales": good["scales"].to(torch.float32) + 1e-6},
            told,
            CheckpointError,
            "not exact",
        ),
    ]
    for tensors, settings_, error, message in cases:
        with pytest.raises(error, match=message):
            from_gptq("layer", tensors, settings_, version=1)


def test_a_layer_without_g_idx_is_read_in_order():
    form = random_affine(0, bits=4, group_size=32)
    tensors = to_gptq("layer", form, version=1)
    del tensors["g_idx"]
    assert_equal(from_gptq("layer", tensors, settings_for(form), version=1), form)


def test_rules_say_what_differs_and_are_read_back():
    four = random_affine(0, bits=4, group_size=32)
    eight = random_affine(0, bits=8, group_size=16, symmetric=False)
    wide = random_affine(0, bits=4, group_size=128)
    forms = {
        "m.tower.layers.0.fc1": None,
        "m.tower.layers.0.fc2": None,
        "m.projector.linear": eight,
        "m.text.layers.1.fc1": four,
        "m.text.layers.1.fc2": four,
        "m.text.layers.2.fc1": four,
        "m.text.layers.11.fc1": eight,
        "m.text.layers.11.fc2": wide,
        "lm_head": None,
    }
    config = gptq_config(
        forms, ("m.tower", "m.projector", "m.text"), version=2, head="lm_head", quantizer="a:1"
    )
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)
    assert config["lm_head"] is False
    assert list(config["dynamic"]) == [
        r"-:(.*\.)?tower\..*",
        r"+:(.*\.)?projector\..*",
        r"+:m\.text\.layers\.11\.fc1$",
        r"+:m\.text\.layers\.11\.fc2$",
        r"-:lm_head$",
    ]
    layout = GptqLayout.from_config(config)
    for name, form in forms.items():
        told = settings_of(config, name)
        assert (told is None) == (form is None)
        if form is not None:
            found = layout.read(name, to_gptq(name, form, version=2))
            assert torch.equal(found.dequantize(), form.dequantize())


def test_one_group_a_row_everywhere_is_written_as_minus_one():
    forms = {
        "a": random_affine(0, bits=4, group_size=64, columns=64),
        "b": random_affine(0, bits=4, group_size=32, columns=32),
    }
    config = gptq_config(forms, (), version=1, head="lm_head", quantizer="a:1")
    assert (config["group_size"], config["dynamic"]) == (-1, {})
    layout = GptqLayout.from_config(config)
    for name, form in forms.items():
        assert_equal(layout.read(name, to_gptq(name, form, version=1)), form)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits must be"),
        ({"bits": "4"}, "bits must be"),
        ({"group_size": 0}, "group_size"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"pack_dtype": "int64"}, "int64"),
        ({"dynamic": {"+:(": {}}}, "regular expression"),
        ({"dynamic": ["-:a"]}, "dynamic"),
    ],
)
def test_a_configuration_without_meaning_is_one_clear_line(changes, message):
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, **changes}
    with pytest.raises(CheckpointError, match=message) as caught:
        GptqLayout.from_config(config)
    assert "\n" not in str(caught.value)
