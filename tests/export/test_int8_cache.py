"""An int8 KV cache is the same in torch, in the saved checkpoint and in ONNX Runtime."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pocketvlm.bundle import Bundle
from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.unstructured.magnitude import Magnitude
from pocketvlm.compress.pruning.unstructured.pruner import Prune
from pocketvlm.compress.quantization.affine.gptq import Gptq
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.kv_cache import QuantizeCache
from pocketvlm.compress.quantization.mixed.stage import MixedPrecision
from pocketvlm.compress.tokens.stage import ReduceTokens
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError, CheckpointError, RecipeError
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.pipeline.plan import plan
from pocketvlm.recipes.load import Recipe
from pocketvlm.reference_graph.forward import (
    DecoderInputs,
    decode_logits,
    embed_prompts,
    encode_images,
    greedy_generate,
    new_cache,
)
from pocketvlm.runtime.onnx.runner import OnnxRunner
from pocketvlm.runtime.onnx.versions import INT8_CACHE_VERSION, LOWEST_ONNX_VERSION
from pocketvlm.stages import Stage, Target, check_order
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.kv_cache import KVCacheScales
from tests.export.rig import Decoder, make_prompt, open_session


@pytest.fixture(scope="module")
def samples() -> CalibrationSet:
    return CalibrationSet.from_reference(0, 9)


@pytest.fixture
def rounded(tiny_checkpoint: Checkpoint, samples: CalibrationSet, ctx: RunContext) -> Checkpoint:
    return QuantizeCache().apply(tiny_checkpoint, samples, ctx)


def steps_of(prompt: DecoderInputs) -> list[DecoderInputs]:
    """A prompt as one run of half of it, two rows alone, and the rest."""
    length = prompt.embeds.shape[1]
    borders = (0, length // 2, length // 2 + 1, length // 2 + 2, length)
    return [
        DecoderInputs(
            embeds=prompt.embeds[:, start:end],
            positions=prompt.positions[:, start:end],
            is_visual=prompt.is_visual[:, start:end],
            next_position=prompt.positions[:, end - 1] + 1,
        )
        for start, end in itertools.pairwise(borders)
    ]


def test_the_kernel_caches_the_codes_that_torch_rounds_to(
    rounded: Checkpoint, tmp_path: Path, exact: ToOnnx, ctx: RunContext
) -> None:
    exact.export(rounded, tmp_path, ctx)
    _, _, prompt = make_prompt(rounded)
    decoder, cache = Decoder(tmp_path, rounded.spec, cache_dtype=np.int8), new_cache(rounded)
    unrounded = new_cache(replace(rounded, cache_grid=None))
    errors, sizes = [], []
    for step in steps_of(prompt):
        found = decoder(step.embeds.numpy(), step.positions.numpy())
        with torch.inference_mode():
            expected = decode_logits(rounded, step, cache, last_only=True)[0, 0].numpy()
            plain = decode_logits(
                replace(rounded, cache_grid=None), step, unrounded, last_only=True
            )[0, 0].numpy()
        errors.append(float(np.abs(found - expected).max()))
        sizes.append(float(np.abs(plain - expected).max()))
    # Rounding is visible in the logits, and the same on both sides.
    assert min(sizes) > 5e-4
    assert max(errors) < min(sizes) / 20, (errors, sizes)
    length = prompt.embeds.shape[1]
    for layer in range(rounded.spec.decoder.depth):
        for kind, scales in rounded.cache_grid.to_tensors().items():
            codes = decoder.cache[f"{layer}.{kind.removesuffix('s')}"][0, :, :length]
            held = cache.rows(layer)[kind == "values"][0] / scales[layer][:, None, :]
            assert codes.dtype == np.int8
            assert (codes == held.round().numpy()).mean() > 0.999


def test_greedy_tokens_on_an_int8_cache(
    rounded: Checkpoint, tmp_path: Path, exact: ToOnnx, ctx: RunContext
) -> None:
    exact.export(rounded, tmp_path, ctx)
    _, _, prompt = make_prompt(rounded)
    expected = greedy_generate(rounded, prompt, max_new_tokens=8)[0]
    decoder = Decoder(tmp_path, rounded.spec, cache_dtype=np.int8)
    embedding = open_session(tmp_path, "embedding")
    logits = decoder(prompt.embeds.numpy(), prompt.positions.numpy())
    tokens: list[int] = []
    for position in range(int(prompt.next_position[0]), int(prompt.next_position[0]) + 8):
        tokens.append(int(logits.argmax()))
        (row,) = embedding.run(None, {"input_ids": np.array([[tokens[-1]]])})
        logits = decoder(row, np.array([[position]]))
    assert tokens == expected


def test_a_whole_prompt_and_the_same_in_steps_agree_in_torch(rounded: Checkpoint) -> None:
    _, _, prompt = make_prompt(rounded)
    cache = new_cache(rounded)
    with torch.inference_mode():
        whole = decode_logits(rounded, prompt, last_only=True)
        for step in steps_of(prompt):
            last = decode_logits(rounded, step, cache, last_only=True)
    torch.testing.assert_close(last, whole, rtol=1e-3, atol=1e-3)


def test_a_channel_spans_its_largest_magnitude(
    rounded: Checkpoint, samples: CalibrationSet
) -> None:
    checkpoint = replace(rounded, cache_grid=None)
    prompts = encode_samples(checkpoint.processor, samples)
    largest = torch.zeros_like(rounded.cache_grid.keys)
    # The last sample of nine only judges.
    for sample, prompt in list(zip(samples, prompts, strict=True))[:8]:
        cache = new_cache(checkpoint)
        with torch.no_grad():
            visual = encode_images(checkpoint, checkpoint.processor.pixels([sample.open_image()]))
            inputs = embed_prompts(checkpoint, torch.tensor([prompt.token_ids]), visual)
            decode_logits(checkpoint, inputs, cache)
        for layer in range(rounded.spec.decoder.depth):
            keys, _ = cache.rows(layer)
            for head in range(largest.shape[1]):
                found = keys[0, head].abs().max(dim=0).values
                largest[layer, head] = torch.maximum(largest[layer, head], found)
    torch.testing.assert_close(rounded.cache_grid.keys * 127, largest, rtol=1e-5, atol=1e-6)


def test_rounding_is_to_the_nearest_code_and_clips() -> None:
    grid = KVCacheScales.from_ranges(torch.full((1, 1, 2), 12.7), torch.full((1, 1, 2), 1.27))
    states = torch.tensor([[[[0.16, -0.149], [99.0, -99.0]]]])
    keys, values = grid.round(0, states, states / 10)
    expected = torch.tensor([[[[0.2, -0.1], [12.7, -12.8]]]])
    torch.testing.assert_close(keys, expected)
    torch.testing.assert_close(values, expected / 10)
    silent = KVCacheScales.from_ranges(torch.zeros(1, 1, 2), torch.ones(1, 1, 2))
    assert bool(torch.isfinite(silent.round(0, states, states)[0]).all())
    with pytest.raises(ValueError, match="not twice"):
        KVCacheScales(keys=torch.ones(1, 2, 4), values=torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="positive float32"):
        KVCacheScales(keys=torch.zeros(1, 2, 4), values=torch.ones(1, 2, 4))


def test_the_record_says_what_it_saves_and_costs(rounded: Checkpoint) -> None:
    metrics = rounded.history[-1].metrics
    assert metrics["bytes_per_token"] * 4 == metrics["bytes_per_token_float32"]
    assert metrics["calibration_samples"] == 8
    assert metrics["held_out_samples"] == 1
    for name in ("key_error", "value_error"):
        assert 1e-4 < metrics[name] < 0.03
    for name in ("keys_clipped", "values_clipped"):
        assert 0 <= metrics[name] < 0.05


def test_the_grid_is_saved_with_the_checkpoint(rounded: Checkpoint, tmp_path: Path) -> None:
    rounded.save(tmp_path / "saved")
    loaded = Checkpoint.load(tmp_path / "saved")
    assert torch.equal(loaded.cache_grid.keys, rounded.cache_grid.keys)
    assert torch.equal(loaded.cache_grid.values, rounded.cache_grid.values)
    assert loaded.history[-1].method == "quantize_cache"
    wrong = KVCacheScales(keys=torch.ones(1, 1, 4), values=torch.ones(1, 1, 4))
    replace(rounded, cache_grid=wrong).save(tmp_path / "wrong")
    with pytest.raises(CheckpointError, match="kv_cache"):
        Checkpoint.load(tmp_path / "wrong")


def test_a_bundle_holds_a_quarter_of_the_cache(
    rounded: Checkpoint, tmp_path: Path, exact: ToOnnx, ctx: RunContext
) -> None:
    runners = {}
    for name, checkpoint in (("int8", rounded), ("float32", replace(rounded, cache_grid=None))):
        (tmp_path / name).mkdir()
        manifest = write_graphs(checkpoint, [exact], tmp_path / name, "0" * 64, ctx)
        assert manifest.kv_cache.dtype == name
        decoder = next(item for item in manifest.components if item.role == "decoder")
        assert {item.dtype for item in decoder.inputs if "past." in item.name} == {name}
        assert ("kv_cache" in decoder.precision) == (name == "int8")
        needed = {"int8": INT8_CACHE_VERSION, "float32": LOWEST_ONNX_VERSION}[name]
        assert manifest.runtimes["onnx"].lowest_version == needed
        runners[name] = OnnxRunner(Bundle.open(tmp_path / name), threads=1, capacity=64)
    assert runners["int8"].cache_bytes * 4 == runners["float32"].cache_bytes
    _, _, prompt = make_prompt(rounded)
    for step in steps_of(prompt):
        found = runners["int8"].decode(step.embeds.numpy(), step.positions.numpy())
    with torch.inference_mode():
        expected = decode_logits(rounded, prompt, last_only=True)[0, 0].numpy()
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()


def test_what_the_stage_refuses(
    rounded: Checkpoint, samples: CalibrationSet, ctx: RunContext
) -> None:
    with pytest.raises(RecipeError, match="quantized already"):
        QuantizeCache().apply(rounded, samples, ctx)
    with pytest.raises(ValueError, match="bits is 4; a KV cache is rounded to 8 bits"):
        QuantizeCache(bits=4)
    checkpoint = replace(rounded, cache_grid=None)
    name = f"{checkpoint.spec.decoder.stack}.0.self_attn.k_proj"
    broken = torch.full_like(checkpoint.form(name).dequantize(), 3e38)
    checkpoint.set_form(name, DenseWeight(values=broken))
    with pytest.raises(CalibrationError, match="not finite"):
        QuantizeCache().apply(checkpoint, samples, ctx)


def test_plan_counts_a_quarter_and_refuses_targets_without_the_kernel(tiny_path: Path) -> None:
    stages = (QuantizeCache(),)
    plain = plan(tiny_path, recipe_of((), (ToOnnx(),)))
    planned = plan(tiny_path, recipe_of(stages, (ToOnnx(),)))
    assert not planned.refused
    assert planned.kv_cache_bytes * 4 == plain.kv_cache_bytes
    assert plain.ram_bytes - planned.ram_bytes == plain.kv_cache_bytes - planned.kv_cache_bytes
    refused = plan(tiny_path, recipe_of(stages, (WithoutTheKernel(),))).refused
    assert refused == (
        "onnx: keeps no KV cache of 8 bits; leave quantize_cache out of the stages for this target",
    )
    with pytest.raises(RecipeError, match="quantize_cache"):
        plan(tiny_path, recipe_of((QuantizeCache(), QuantizeCache()), (ToOnnx(),)))


@pytest.mark.parametrize(
    "later",
    [
        RoundToNearest(rules=(WeightRule(bits=8),)),
        Gptq(rules=(WeightRule(bits=4),)),
        MixedPrecision(options=(WeightRule(bits=4),), average_bits=5),
        Prune(score=Magnitude()),
        ReduceTokens(keep=0.5),
    ],
    ids=lambda stage: stage.method,
)
def test_ranges_are_those_of_the_last_weights(later: Stage) -> None:
    check_order((later, QuantizeCache()))
    with pytest.raises(RecipeError, match=r"cannot follow a stage that leaves .*quantized_cache"):
        check_order((QuantizeCache(), later))


class WithoutTheKernel(ToOnnx):
    """A target that keeps float32 caches alone."""

    cache_bits = frozenset()


def recipe_of(stages: tuple[Stage, ...], targets: tuple[Target, ...]) -> Recipe:
    return Recipe(name="test", stages=stages, targets=targets)
