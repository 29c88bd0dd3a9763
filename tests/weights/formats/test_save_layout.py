"""Whole directories: written in each layout, read back with equal weights, refused where due."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.checkpoint.convert import save_layout
from pocketvlm.checkpoint.layouts import LAYOUTS
from pocketvlm.errors import CheckpointError, UnsupportedError
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.codebook import CodebookWeight, Lookup
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.kv_cache import KVCacheScales
from tests.weights.formats.slow_readers import (
    group_of,
    read_compressed_tensors,
    read_gptq,
    read_vptq,
    settings_of,
)


def affine(shape, seed, *, bits=4, group_size=16, symmetric=True) -> AffineWeight:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    groups = -(-columns // group_size)
    zeros = torch.randint(1, 1 << bits, (rows, groups), generator=generator)
    zeros = torch.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros
    codes = torch.randint(0, 1 << bits, (rows, groups * group_size), generator=generator)
    if groups * group_size > columns:
        codes[:, columns:] = zeros[:, -1:]
    return AffineWeight.from_codes(
        codes,
        (torch.rand(rows, groups, generator=generator) / 64 + 0.001).to(torch.float16),
        None if symmetric else zeros,
        bits=bits,
        group_size=group_size,
        in_features=columns,
    )


def codebook(shape, seed, codebooks) -> CodebookWeight:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    indices = torch.randint(0, 16, (rows // 4, columns), generator=generator)
    return CodebookWeight(
        main=Lookup.from_indices(indices, codebooks, index_bits=4),
        residual=Lookup.from_indices(indices % 4, codebooks[:, :, :4] / 8, index_bits=2),
        order=torch.randperm(columns, generator=generator).to(torch.int32),
        column_scales=torch.rand(columns, generator=generator).to(torch.float16),
        column_offsets=torch.rand(columns, generator=generator).to(torch.float16),
    )


def quantize_affine(checkpoint: Checkpoint, *, symmetric: bool = False) -> None:
    """Every part: 4 bits in the decoder, 8 (asymmetric) in one tower layer, a 3-bit layer."""
    for seed, (linear, form) in enumerate(checkpoint.forms().items()):
        if linear.part == "decoder":
            checkpoint.set_form(linear.name, affine(form.shape, seed))
        elif linear.part == "tower" and linear.role == "fc1":
            made = affine(form.shape, seed, bits=8, group_size=32, symmetric=symmetric)
            checkpoint.set_form(linear.name, made)
        elif linear.part == "projector":
            checkpoint.set_form(linear.name, affine(form.shape, seed, bits=3, group_size=32))
        elif linear.part in ("embedding", "head"):
            checkpoint.set_form(linear.name, affine(form.shape, seed, bits=8))


def quantize_codebook(checkpoint: Checkpoint) -> None:
    """The decoder, with codebooks that all its layers share."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(1, 1, 16, 4, generator=generator).to(torch.float16)
    for seed, (linear, form) in enumerate(checkpoint.forms().items()):
        if linear.part == "decoder":
            checkpoint.set_form(linear.name, codebook(form.shape, seed, shared))


QUANTIZE = {
    "gptq": quantize_affine,
    "gptq_v2": quantize_affine,
    "compressed-tensors": quantize_affine,
    "vptq": quantize_codebook,
}
# How each layout's configuration speaks of a linear layer; `None` where it is float.
TOLD = {
    "gptq": settings_of,
    "gptq_v2": settings_of,
    "compressed-tensors": group_of,
    "vptq": lambda config, name: config["config_for_layers"].get(name),
}


def test_every_layout_is_tried():
    assert set(QUANTIZE) == set(LAYOUTS)


@pytest.mark.parametrize("layout", list(QUANTIZE))
def test_a_directory_is_read_back_with_equal_weights(tiny_checkpoint, tmp_path, layout):
    QUANTIZE[layout](tiny_checkpoint)
    saved = save_layout(tiny_checkpoint, tmp_path / "out", layout=layout)
    found = Checkpoint.load(tmp_path / "out")
    assert saved.weight_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    for linear, form in tiny_checkpoint.forms().items():
        other = found.form(linear.name)
        assert torch.equal(other.dequantize(), form.dequantize()), linear.name
        if linear.name in saved.quantized:
            assert type(other) is type(form)
            if isinstance(form, AffineWeight):
                count = linear.in_features
                assert torch.equal(other.codes()[:, :count], form.codes()[:, :count])
            else:
                assert torch.equal(other.main.indices(), form.main.indices())
                assert torch.equal(other.residual.indices(), form.residual.indices())
        else:
            assert isinstance(other, DenseWeight)
    theirs = dict(found.model.named_parameters())
    for name, parameter in tiny_checkpoint.model.named_parameters():
        assert torch.equal(theirs[name], parameter), name
    assert "quantization_config" not in found.config
    # What was read can be saved and loaded as any other checkpoint.
    found.save(tmp_path / "again")
    again = Checkpoint.load(tmp_path / "again")
    name = saved.quantized[0]
    assert torch.equal(again.form(name).dequantize(), found.form(name).dequantize())


@pytest.mark.parametrize("layout", list(QUANTIZE))
def test_a_reader_of_the_definition_finds_the_same_weights(tiny_checkpoint, tmp_path, layout):
    QUANTIZE[layout](tiny_checkpoint)
    saved = save_layout(tiny_checkpoint, tmp_path / "out", layout=layout)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if layout in ("gptq", "gptq_v2"):
        assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config
        assert config["checkpoint_format"] == layout
    quantized = set(saved.quantized)
    for name, module in tiny_checkpoint.model.named_modules():
        if hasattr(module, "form") and name != tiny_checkpoint.spec.decoder.embedding:
            is_tied = tiny_checkpoint.spec.decoder.tied_head and name == "lm_head"
            if not is_tied:
                assert (TOLD[layout](config, name) is not None) == (name in quantized), name
    # The narrowest layers: the slow reader visits every bit.
    for name in sorted(quantized, key=lambda name: tiny_checkpoint.layer(name).form.shape)[:2]:
        form = tiny_checkpoint.form(name)
        tensors = {
            key.removeprefix(name + "."): value
            for key, value in stored.items()
            if key.startswith(name + ".")
        }
        told = TOLD[layout](config, name)
        if layout == "vptq":
            dense = torch.from_numpy(read_vptq(tensors, told))
            assert torch.allclose(dense.float(), form.dequantize(), rtol=1e-4, atol=1e-5)
            continue
        if layout == "compressed-tensors":
            dense = read_compressed_tensors(tensors, told)
        else:
            dense = read_gptq(tensors, told["bits"], version=1 if layout == "gptq" else 2)
        assert torch.equal(torch.from_numpy(dense).float(), form.dequantize())


def test_every_float_layer_is_named_where_vptq_looks(tiny_checkpoint, tmp_path):
    quantize_codebook(tiny_checkpoint)
    saved = save_layout(tiny_checkpoint, tmp_path / "out", layout="vptq")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    linears = {n for n, m in tiny_checkpoint.model.named_modules() if hasattr(m, "form")}
    linears.discard(tiny_checkpoint.spec.decoder.embedding)
    assert set(config["modules_to_not_convert"]) == linears - set(saved.quantized)


def test_a_quantized_table_becomes_the_narrowest_float_and_is_told(tiny_checkpoint, tmp_path):
    quantize_affine(tiny_checkpoint)
    embedding = tiny_checkpoint.spec.decoder.embedding
    saved = save_layout(tiny_checkpoint, tmp_path / "out", layout="gptq")
    assert saved.dense[embedding] == "float32"  # 8-bit codes times an 11-bit scale fit nothing less
    assert any(embedding in note for note in saved.notes)
    untouched = next(name for name in saved.dense if name != embedding)
    assert saved.dense[untouched] == "bfloat16"


def test_what_stays_behind_is_told(tiny_checkpoint, tmp_path):
    quantize_affine(tiny_checkpoint)
    decoder = tiny_checkpoint.spec.decoder
    scales = torch.ones(decoder.depth, decoder.kv_heads, decoder.head_dim)
    held = replace(tiny_checkpoint, cache_grid=KVCacheScales(keys=scales, values=scales))
    saved = save_layout(held, tmp_path / "out", layout="gptq")
    assert any("KV cache" in note for note in saved.notes)


def test_a_layout_that_transformers_reads_lists_its_layers(tiny_checkpoint, tmp_path):
    """One setting for all quantized layers: listed. Several: told, with the layout that is read."""
    quantize_affine(tiny_checkpoint)
    mixed = save_layout(tiny_checkpoint, tmp_path / "mixed", layout="gptq_v2")
    config = json.loads((tmp_path / "mixed" / "quantize_config.json").read_text())
    assert "modules_in_block_to_quantize" not in config
    assert any("compressed-tensors" in note for note in mixed.notes)
    for linear, form in tiny_checkpoint.forms().items():
        if linear.part in ("tower", "projector") and isinstance(form, AffineWeight):
            checkpoint_float = DenseWeight(values=form.dequantize())
            tiny_checkpoint.set_form(linear.name, checkpoint_float)
        elif linear.part == "head":
            tiny_checkpoint.set_form(linear.name, DenseWeight(values=form.dequantize()))
    alike = save_layout(tiny_checkpoint, tmp_path / "alike", layout="gptq_v2")
    config = json.loads((tmp_path / "alike" / "quantize_config.json").read_text())
    assert sorted(config["modules_in_block_to_quantize"][0]) == sorted(alike.quantized)
    block = config["block_name_to_quantize"]
    assert block.endswith("layers")
    assert all(name.startswith(block + ".") for name in alike.quantized)
    assert not any("compressed-tensors" in note for note in alike.notes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_points_that_transformers_cannot_load_are_told(tiny_checkpoint, tmp_path, symmetric):
    quantize_affine(tiny_checkpoint, symmetric=symmetric)
    saved = save_layout(tiny_checkpoint, tmp_path / "out", layout="compressed-tensors")
    assert any("asymmetric" in note and "fc1" in note for note in saved.notes) != symmetric
    assert any("generate" in note for note in saved.notes)  # its tower is quantized


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_scales_that_bfloat16_would_round_are_told(tiny_checkpoint, tmp_path, key):
    quantize_affine(tiny_checkpoint)
    plain = {k: v for k, v in tiny_checkpoint.config.items() if k not in ("dtype", "torch_dtype")}
    for dtype, is_told in (("bfloat16", True), ("float16", False)):
        stored = replace(tiny_checkpoint, config={**plain, key: dtype})
        saved = save_layout(stored, tmp_path / dtype, layout="compressed-tensors")
        assert any("bfloat16" in note for note in saved.notes) == is_told


def test_what_a_layout_cannot_hold_is_one_clear_line(tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UnsupportedError, match="no linear layer is quantized"):
        save_layout(tiny_checkpoint, out, layout="gptq")
    quantize_codebook(tiny_checkpoint)
    with pytest.raises(UnsupportedError, match="kind 'codebook', and layout gptq holds 'affine'"):
        save_layout(tiny_checkpoint, out, layout="gptq")
    with pytest.raises(UnsupportedError, match="known are gptq, gptq_v2, compressed-tensors, vptq"):
        save_layout(tiny_checkpoint, out, layout="awq")
    assert not out.exists()


def test_what_was_folded_is_not_written_for_readers_of_stock_s_tensors(tmp_path):
    write_tiny_model("internvl3", tmp_path / "model")
    checkpoint = Checkpoint.load(tmp_path / "model")
    quantize_affine(checkpoint)
    with pytest.raises(UnsupportedError, match="internvl checkpoint cannot be written for other"):
        save_layout(checkpoint, tmp_path / "out", layout="gptq")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_things_is_left_alone(tiny_checkpoint, tiny_path, tmp_path):
    quantize_affine(tiny_checkpoint)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("")
    for path in (foreign, tiny_path, file):
        with pytest.raises(CheckpointError, match=str(path.name)):
            save_layout(tiny_checkpoint, path, layout="gptq")
    assert (foreign / "thesis.txt").read_text() == "years of work"
    for _ in range(2):  # what was written here may be written again
        save_layout(tiny_checkpoint, tmp_path / "ours", layout="gptq")


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"quant_method": "awq"}, "'awq' is not supported; supported are gptq, vptq, compr"),
        ({}, "quant_method None"),
        ("gptq", "not a JSON object"),
        ({"quant_method": "gptq", "group_size": 16}, "'bits' is missing"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 16}, "bits and group size say"),
    ],
)
def test_a_directory_that_cannot_be_read_is_one_clear_line(
    tiny_checkpoint, tmp_path, declared, message
):
    quantize_affine(tiny_checkpoint)
    save_layout(tiny_checkpoint, tmp_path / "out", layout="gptq")
    file: Path = tmp_path / "out" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": declared}))
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.load(tmp_path / "out")
    assert "\n" not in str(caught.value)
