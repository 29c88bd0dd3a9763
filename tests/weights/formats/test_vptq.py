"""The VPTQ layout of a layer: against a slow reader, exact round trips, what it cannot hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.errors import CheckpointError, UnsupportedError
from pocketvlm.weights.codebook import CodebookWeight, Lookup
from pocketvlm.weights.formats import VptqLayout, from_vptq, to_vptq, vptq_layer_config
from tests.weights.formats.slow_readers import read_vptq

ROWS = 8


def random_lookup(generator, *, columns, length=2, bits=3, groups=1, entries=None):
    entries = entries or 1 << bits
    return Lookup.from_indices(
        torch.randint(0, entries, (ROWS // length, columns), generator=generator),
        torch.randn(1, groups, entries, length, generator=generator).to(torch.float16),
        index_bits=bits,
    )


def random_codebook(
    seed, *, length=2, bits=3, groups=1, residual_bits=0, outliers=0, order=False, norm=False
) -> CodebookWeight:
    generator = torch.Generator().manual_seed(seed)
    columns = 6 * groups
    width = columns + outliers

    def halves() -> torch.Tensor:
        return torch.randn(width, generator=generator).to(torch.float16)

    return CodebookWeight(
        main=random_lookup(generator, columns=columns, length=length, bits=bits, groups=groups),
        residual=(
            random_lookup(
                generator, columns=columns, length=length, bits=residual_bits, groups=groups
            )
            if residual_bits
            else None
        ),
        outliers=(
            random_lookup(generator, columns=outliers, length=4, bits=2) if outliers else None
        ),
        order=(torch.randperm(width, generator=generator).to(torch.int32) if order else None),
        column_scales=halves() if norm else None,
        column_offsets=halves() if norm else None,
    )


def assert_equal(found: CodebookWeight, form: CodebookWeight) -> None:
    ours, theirs = form.to_tensors(), found.to_tensors()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(theirs[key], value), key
    assert found.to_metadata() == form.to_metadata()


@settings(max_examples=40, deadline=None)
@given(
    length=st.sampled_from([1, 2, 4, 8]),
    bits=st.sampled_from([1, 3, 4, 8, 11, 16]),
    groups=st.sampled_from([1, 2, 3]),
    residual=st.sampled_from([0, 1, 2, 16]),
    outliers=st.sampled_from([0, 1, 3]),
    order=st.booleans(),
    norm=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_round_trip_keeps_every_index_and_centroid(
    length, bits, groups, residual, outliers, order, norm, seed
):
    form = random_codebook(
        seed,
        length=length,
        bits=bits,
        groups=groups,
        residual_bits=min(residual, bits),
        outliers=outliers,
        order=order,
        norm=norm,
    )
    config = vptq_layer_config(form, has_bias=False)
    assert_equal(from_vptq("layer", to_vptq("layer", form), config), form)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"groups": 2, "bits": 5},
        {"residual_bits": 2},
        {"bits": 9, "residual_bits": 9, "groups": 2},
        {"outliers": 2, "order": True},
        {"residual_bits": 3, "outliers": 3, "order": True, "norm": True, "groups": 2, "length": 4},
    ],
)
def test_a_reader_of_the_definition_finds_the_same_weights(parts):
    form = random_codebook(5, **parts)
    dense = read_vptq(to_vptq("layer", form), vptq_layer_config(form, has_bias=False))
    # The form adds in float32, the slow reader in float64.
    assert np.allclose(dense, form.dequantize().double().numpy(), rtol=1e-5, atol=1e-6)
    if not {"norm", "residual_bits"} & parts.keys():
        assert np.array_equal(dense, form.dequantize().double().numpy())


def test_the_residual_index_lies_above_the_main_one():
    generator = torch.Generator().manual_seed(0)
    main = replace(
        random_lookup(generator, columns=4, bits=4), packed=torch.full((4, 2), 0x55).byte()
    )
    residual = replace(
        random_lookup(generator, columns=4, bits=2), packed=torch.full((4, 1), 0xFF).byte()
    )
    form = CodebookWeight(main=main, residual=residual)
    words = to_vptq("layer", form)["indices"]
    assert words.shape == (1, 4, 1)
    assert words[0, 0].item() == 0b110101_110101_110101_110101


def test_an_order_of_many_columns_travels_as_sixteen_bits():
    columns = 40_000
    form = CodebookWeight(
        main=Lookup.from_indices(
            torch.zeros(1, columns, dtype=torch.int64),
            torch.zeros(1, 1, 2, 2, dtype=torch.float16),
            index_bits=1,
        ),
        order=torch.arange(columns).flip(0).to(torch.int32),
    )
    stored = to_vptq("layer", form)
    assert stored["perm"].dtype == torch.int16
    assert np.array_equal(stored["perm"].numpy().view(np.uint16), form.order.numpy())
    found = from_vptq("layer", stored, vptq_layer_config(form, has_bias=False))
    assert torch.equal(found.order, form.order)


def test_codebooks_are_filled_up_to_a_power_of_two():
    generator = torch.Generator().manual_seed(0)
    form = CodebookWeight(main=random_lookup(generator, columns=6, bits=4, entries=5))
    config = vptq_layer_config(form, has_bias=False)
    tensors = to_vptq("layer", form)
    assert config["num_centroids"] == [-1, 8]
    assert tensors["centroids.weight"].shape == (1, 8 * 2)
    found = from_vptq("layer", tensors, config)
    assert torch.equal(found.main.indices(), form.main.indices())
    assert torch.equal(found.dequantize(), form.dequantize())


def test_one_of_scales_and_offsets_brings_a_neutral_other():
    form = replace(
        random_codebook(0), column_scales=torch.rand(6).to(torch.float16), column_offsets=None
    )
    config = vptq_layer_config(form, has_bias=False)
    found = from_vptq("layer", to_vptq("layer", form), config)
    assert torch.equal(found.dequantize(), form.dequantize())


def test_what_the_layout_cannot_hold_is_refused_by_name():
    generator = torch.Generator().manual_seed(0)
    plain = random_codebook(0)

    def two_row_groups() -> Lookup:
        return replace(plain.main, codebooks=plain.main.codebooks.expand(2, 1, -1, -1).contiguous())

    ragged = Lookup.from_indices(
        torch.zeros(4, 7, dtype=torch.int64),
        plain.main.codebooks.expand(1, 2, -1, -1),
        index_bits=3,
    )
    cases = [
        (replace(plain, row_scales=torch.ones(ROWS).half()), "normalize: none or normalize: col"),
        (CodebookWeight(main=two_row_groups()), "groups of rows"),
        (CodebookWeight(main=ragged), "equally wide"),
        (
            replace(plain, residual=random_lookup(generator, columns=6, length=4)),
            "not those of the main",
        ),
        (replace(plain, residual=random_lookup(generator, columns=6, bits=4)), "drop bits"),
        (
            replace(plain, outliers=random_lookup(generator, columns=2, length=1)),
            "vectors of one row",
        ),
        (
            replace(plain, outliers=random_lookup(generator, columns=2, groups=2)),
            "several codebooks",
        ),
    ]
    for form, message in cases:
        with pytest.raises(UnsupportedError, match=f"block.fc1: .*{message}"):
            to_vptq("block.fc1", form)


def test_stored_tensors_that_contradict_their_settings_are_refused():
    form = random_codebook(0, residual_bits=2, norm=True, order=True)
    good, config = to_vptq("layer", form), vptq_layer_config(form, has_bias=False)
    fine = good["centroids.weight"].to(torch.float32) + 1e-6
    cases = [
        ({"indices": good["indices"]}, config, CheckpointError, "centroids"),
        (good, {**config, "enable_perm": False}, CheckpointError, "perm has no place"),
        (good, {**config, "group_size": 5}, CheckpointError, "cover 5 columns"),
        (good, {**config, "num_centroids": [-1, 16]}, CheckpointError, "config_for_layers says"),
        (good, {**config, "num_centroids": [-1, 6]}, UnsupportedError, "power of two"),
        (good, {**config, "vector_lens": [-1, 3]}, UnsupportedError, "do not divide"),
        (good, {**config, "is_indice_packed": False}, UnsupportedError, "packed"),
        (good, {"vector_lens": [-1, 2]}, CheckpointError, "incomplete"),
        ({**good, "centroids.weight": fine}, config, CheckpointError, "not exact"),
    ]
    for tensors, told, error, message in cases:
        with pytest.raises(error, match=message):
            from_vptq("layer", tensors, told)


def test_settings_may_be_shared_by_the_last_name_of_a_layer():
    form = random_codebook(0)
    layout = VptqLayout.from_config(
        {"shared_layer_config": {"fc1": vptq_layer_config(form, has_bias=False)}}
    )
    assert_equal(layout.read("block.0.fc1", to_vptq("fc1", form)), form)
    with pytest.raises(CheckpointError, match="lacks block.0.fc2"):
        layout.read("block.0.fc2", to_vptq("fc2", form))
