"""Scaling: the float model stays what it is, and rounding it costs less."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.walk.moments import SecondMoment
from pocketvlm.calibration.walk.steps import InputMoments
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.affine.awq import Awq
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.affine.scale_search import (
    candidate_scales,
    choose_scale,
    rounding_losses,
)
from pocketvlm.compress.quantization.kv_cache import QuantizeCache
from pocketvlm.compress.quantization.transforms.rotation import Rotate
from pocketvlm.compress.tokens import ReduceTokens
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError, RecipeError
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import build_bundle
from pocketvlm.recipes.load import load_recipe
from pocketvlm.weights.dense import DenseWeight
from tests.compress.quantization.functions import (
    logits_of,
    plant_outliers,
    relative_error,
    stored_bytes_of,
)

RULES = (WeightRule(bits=3, group_size=16),)
CONTEXT = RunContext(threads=1)


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet.from_reference(0, 8)


def rows_of(checkpoint):
    return {row["name"]: row for row in checkpoint.history[-1].layers}


def moment_of(inputs):
    moment = SecondMoment(inputs.shape[1])
    moment.add(inputs)
    return moment


def moments_of(inputs, held_out=None):
    judge = None if held_out is None else moment_of(held_out)
    return InputMoments(calibration=moment_of(inputs), held_out=judge)


def correlated(tokens, channels, *, outliers, seed):
    """Inputs of a trained layer: correlated, some channels far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator) / channels**0.5
    inputs = torch.randn(tokens, channels, generator=generator) @ mixing
    inputs[:, torch.randperm(channels, generator=generator)[:outliers]] *= 30
    return inputs


def slow_round(row, bits, group_size):
    """Round-to-nearest of one row in float64, a weight at a time."""
    rounded = []
    for start in range(0, len(row), group_size):
        group = row[start : start + group_size]
        low, high = min(0.0, *group), max(0.0, *group)
        scale = float(torch.tensor((high - low) / (2**bits - 1)).to(torch.float16)) or 1.0
        zero = round(-low / scale)
        rounded += [
            (min(max(round(value / scale) + zero, 0), 2**bits - 1) - zero) * scale
            for value in group
        ]
    return rounded


@pytest.mark.parametrize("reduced", [False, True], ids=["all_tokens", "reduced"])
def test_the_float_model_computes_what_it_did(tiny_checkpoint, samples, reduced):
    checkpoint = plant_outliers(tiny_checkpoint)
    if reduced:
        checkpoint = ReduceTokens(keep=0.5).apply(checkpoint, samples, CONTEXT)
    expected = logits_of(checkpoint)
    done = Awq(rules=RULES).apply(checkpoint, samples, CONTEXT)
    assert relative_error(logits_of(done), expected) < 1e-5
    rows = rows_of(done)
    assert rows.keys() == {linear.name for linear in done.spec.linears()}
    scaled = {row["role"] for row in rows.values() if row["method"] == "awq"}
    assert scaled >= {"q_proj", "k_proj", "v_proj", "fc1", "gate_proj", "up_proj"}
    for row in rows.values():
        if row["method"] == "awq":
            assert row["exponent"] > 0
            assert row["reason"] == ""
            assert isinstance(done.form(row["name"]), DenseWeight)
            assert row["bits_per_weight"] == 32
        else:
            assert row["reason"]
    for row in (row for row in rows.values() if row["role"] == "fc2"):
        assert "gelu" in row["reason"]
    projector = rows[done.spec.projector.linears[0]]
    if done.spec.family == "llava":
        assert "residual stream" in projector["reason"]
    elif reduced:
        assert "reducer" in projector["reason"]
    else:
        assert projector["folded_into"].endswith("post_layernorm")
        assert projector["method"] == "awq"
    json.dumps([done.history[-1].layers, done.history[-1].metrics], allow_nan=False)


def test_rounding_a_scaled_model_changes_its_answers_less(tiny_path, samples):
    readers = r".*\.(q_proj|k_proj|v_proj|fc1|gate_proj|up_proj)"
    rules = (WeightRule(match=readers, bits=4, group_size=16),)
    errors = {}
    for name, stages in {
        "rtn": [RoundToNearest(rules=rules)],
        "awq": [Awq(rules=rules), RoundToNearest(rules=rules)],
    }.items():
        checkpoint = plant_outliers(Checkpoint.load(tiny_path))
        expected = logits_of(checkpoint)
        for stage in stages:
            checkpoint = stage.apply(checkpoint, samples, CONTEXT)
        errors[name] = relative_error(logits_of(checkpoint), expected)
    assert errors["awq"] < 0.6 * errors["rtn"]


def test_query_heads_of_a_group_share_the_scale_of_their_value_head(tiny_checkpoint, samples):
    decoder = tiny_checkpoint.spec.decoder
    path = f"{decoder.stack}.0.self_attn"
    value = tiny_checkpoint.form(f"{path}.v_proj")
    # Output channels of v that differ in size are what o_proj's inputs need a scale for.
    sizes = torch.logspace(0, 1.5, value.shape[0])[:, None]
    tiny_checkpoint.set_form(f"{path}.v_proj", DenseWeight(values=value.dequantize() * sizes))
    before = {
        role: tiny_checkpoint.form(f"{path}.{role}").dequantize() for role in ("v_proj", "o_proj")
    }
    only_out = (WeightRule(match=rf"{path}.o_proj".replace(".", r"\."), bits=3, group_size=16),)
    done = Awq(rules=only_out).apply(tiny_checkpoint, samples, CONTEXT)
    row = rows_of(done)[f"{path}.o_proj"]
    assert row["method"] == "awq"
    assert row["folded_into"] == f"{path}.v_proj"
    ratio = (done.form(f"{path}.o_proj").dequantize() / before["o_proj"]).median(dim=0).values
    heads = ratio.view(decoder.kv_heads, -1, decoder.head_dim)
    assert heads.shape[1] == decoder.heads // decoder.kv_heads > 1
    assert torch.allclose(heads, heads[:, :1].expand_as(heads), rtol=1e-5)
    assert float(ratio.max() / ratio.min()) > 1.5
    inverse = (before["v_proj"] / done.form(f"{path}.v_proj").dequantize()).median(dim=1).values
    assert torch.allclose(heads[:, 0].flatten(), inverse, rtol=1e-5)


def test_merged_patches_share_the_scale_of_their_channel(tiny_paths, samples):
    checkpoint = plant_outliers(Checkpoint.load(tiny_paths["smolvlm"]))
    name = checkpoint.spec.projector.linears[0]
    before = checkpoint.form(name).dequantize()
    done = Awq(rules=(WeightRule(part="projector", bits=3, group_size=16),)).apply(
        checkpoint, samples, CONTEXT
    )
    ratio = (done.form(name).dequantize() / before).median(dim=0).values
    copies = ratio.view(checkpoint.spec.projector.merge_factor**2, -1)
    assert torch.allclose(copies, copies[:1].expand_as(copies), rtol=1e-5)
    assert float(ratio.max() / ratio.min()) > 1.5
    assert any("reduce visual tokens before" in note for note in done.history[-1].notes)


@pytest.mark.parametrize("group_size", [8, 24])
def test_the_search_finds_what_a_slow_one_finds(group_size):
    tokens, channels, rows, points = 40, 24, 6, 6
    inputs = correlated(tokens, channels, outliers=3, seed=1)
    weight = torch.randn(rows, channels, generator=torch.Generator().manual_seed(2))
    rule = WeightRule(bits=3, group_size=group_size)
    choice = choose_scale(
        {"layer": (DenseWeight(values=weight), rule)},
        moments_of(inputs),
        torch.arange(channels),
        points,
    )
    X, W = inputs.double().tolist(), weight.double().tolist()
    size = [sum(x[j] ** 2 for x in X) ** 0.5 for j in range(channels)]
    losses = []
    for point in range(points):
        scale = [value ** (point / (points - 1)) for value in size]
        total = 0.0
        for w in W:
            scaled = [a * s for a, s in zip(w, scale, strict=True)]
            rounded = slow_round(scaled, 3, group_size)
            change = [r / s - a for r, s, a in zip(rounded, scale, w, strict=True)]
            total += sum(sum(d * v for d, v in zip(change, x, strict=True)) ** 2 for x in X)
        losses.append(total)
    best = min(range(points), key=losses.__getitem__)
    assert best > 0
    assert choice.exponent == pytest.approx(best / (points - 1))
    figures = choice.figures["layer"]
    assert figures["loss"] / figures["loss_rtn"] == pytest.approx(
        losses[best] / losses[0], rel=0.02
    )
    expected = torch.tensor([value ** (best / (points - 1)) for value in size])
    assert choice.scale is not None
    ratio = choice.scale / expected
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-5)


@given(
    seed=st.integers(0, 2**16),
    bits=st.sampled_from([2, 3, 4]),
    outliers=st.integers(0, 6),
    symmetric=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_a_scale_is_kept_only_where_held_out_tokens_gain(seed, bits, outliers, symmetric):
    channels, columns = 16, torch.arange(32) % 16
    inputs = correlated(96, 32, outliers=outliers, seed=seed)
    weight = torch.randn(12, 32, generator=torch.Generator().manual_seed(seed + 1))
    layer = (DenseWeight(values=weight), WeightRule(bits=bits, group_size=8, symmetric=symmetric))
    moments = moments_of(inputs[:64], inputs[64:])
    choice = choose_scale({"layer": layer}, moments, columns, 8)
    figures = choice.figures["layer"]
    assert figures["loss"] <= figures["loss_rtn"]
    if choice.scale is None:
        assert choice.exponent == 0
        assert choice.reason
    else:
        assert choice.scale.shape == (channels,)
        assert figures["loss"] < figures["loss_rtn"]
        # What it claims is what the scaled weight really costs.
        pair = torch.stack([torch.ones(32), choice.scale[columns]])
        plain, scaled = rounding_losses(*layer, pair, moments.held_out).tolist()
        assert scaled / plain == pytest.approx(figures["loss"] / figures["loss_rtn"], rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outlier_channels_gain(bits):
    inputs = correlated(256, 64, outliers=4, seed=3)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(4))
    choice = choose_scale(
        {"layer": (DenseWeight(values=weight), WeightRule(bits=bits, group_size=32))},
        moments_of(inputs[:192], inputs[192:]),
        torch.arange(64),
        20,
    )
    figures = choice.figures["layer"]
    assert figures["loss"] < 0.5 * figures["loss_rtn"]
    assert figures["judged_on"] == "held-out tokens"


@given(magnitudes=st.lists(st.floats(0, 1e6), min_size=1, max_size=40), points=st.integers(2, 30))
@settings(max_examples=60, deadline=None)
def test_candidates_start_at_one_and_grow_with_the_activations(magnitudes, points):
    values = torch.tensor(magnitudes, dtype=torch.float64)
    scales = candidate_scales(values, points)
    assert scales.shape == (points, len(magnitudes))
    assert torch.equal(scales[0], torch.ones(len(magnitudes), dtype=torch.float64))
    assert bool(torch.isfinite(scales).all())
    assert bool((scales > 0).all())
    assert torch.allclose(scales.log().mean(dim=1), torch.zeros(points).double(), atol=1e-9)
    order = values.argsort()
    assert bool((scales[:, order].diff(dim=1) >= -1e-12).all())


def test_layers_that_stay_float_follow_the_scale_of_their_neighbours(tiny_checkpoint, samples):
    checkpoint = plant_outliers(tiny_checkpoint)
    block = f"{checkpoint.spec.decoder.stack}.0"
    rules = (WeightRule(match=rf"{block}.self_attn.k_proj".replace(".", r"\."), bits=2),)
    expected = logits_of(checkpoint)
    done = Awq(rules=rules).apply(checkpoint, samples, CONTEXT)
    rows = rows_of(done)
    assert rows[f"{block}.self_attn.k_proj"]["method"] == "awq"
    assert rows[f"{block}.self_attn.q_proj"]["method"] == "awq"
    assert rows[f"{block}.mlp.gate_proj"]["method"] == "none"
    assert relative_error(logits_of(done), expected) < 1e-5


def test_the_head_of_an_untied_model_is_scaled_too(tiny_checkpoint, samples):
    checkpoint = plant_outliers(tiny_checkpoint)
    expected = logits_of(checkpoint)
    done = Awq(rules=RULES).apply(checkpoint, samples, CONTEXT)
    rows = rows_of(done)
    decoder = done.spec.decoder
    if decoder.tied_head:
        assert "one weight" in rows[decoder.embedding]["reason"]
        assert done.form(decoder.head) is done.form(decoder.embedding)
    else:
        assert "lookup" in rows[decoder.embedding]["reason"]
        assert rows[decoder.head]["folded_into"] == decoder.norm
        assert rows[decoder.head]["method"] == "awq"
    assert relative_error(logits_of(done), expected) < 1e-5


def test_a_saved_checkpoint_comes_back_to_the_same_logits(tiny_checkpoint, samples, tmp_path):
    done = Awq(rules=RULES).apply(plant_outliers(tiny_checkpoint), samples, CONTEXT)
    done.save(tmp_path / "saved")
    again = Checkpoint.load(tmp_path / "saved")
    assert stored_bytes_of(again) == stored_bytes_of(done)
    assert torch.equal(logits_of(again), logits_of(done))
    assert again.history[-1].method == "awq"


class _Stop(Exception):  # noqa: N818  (a signal of the test, not an error)
    pass


def test_the_same_bytes_twice_and_after_a_kill(tiny_path, samples, tmp_path):
    def run(context):
        checkpoint = plant_outliers(Checkpoint.load(tiny_path))
        return Awq(rules=RULES).apply(checkpoint, samples, context)

    calls = itertools.count()

    def stop(progress):
        if next(calls) == 25:
            raise _Stop

    expected = stored_bytes_of(run(CONTEXT))
    with pytest.raises(_Stop):
        run(RunContext(threads=1, scratch_dir=tmp_path, on_progress=stop))
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert kept
    done = run(RunContext(threads=1, scratch_dir=tmp_path))
    assert stored_bytes_of(done) == expected
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_scaling_follows_a_rotation(tiny_checkpoint, samples):
    expected = logits_of(tiny_checkpoint)
    rotated = Rotate(untie_head=True).apply(tiny_checkpoint, samples, CONTEXT)
    done = Awq(rules=RULES).apply(rotated, samples, CONTEXT)
    assert relative_error(logits_of(done), expected) < 1e-5


def test_a_quantized_cache_is_left_alone(tiny_checkpoint, samples):
    done = QuantizeCache().apply(tiny_checkpoint, samples, CONTEXT)
    with pytest.raises(RecipeError, match="comes before quantize_cache"):
        Awq(rules=RULES).apply(done, samples, CONTEXT)


def test_wrong_input_is_named(tiny_checkpoint, samples):
    for wrong in ({"rules": ()}, {"grid_points": 1}, {"held_out": 0.9}, {"tower_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Awq(**{"rules": RULES, **wrong})
    with pytest.raises(ValueError, match="modality_weights"):
        Awq(rules=RULES, modality_weights="loud")
    with pytest.raises(RecipeError, match="matches none"):
        Awq(rules=(WeightRule(match="nothing", bits=4),)).apply(tiny_checkpoint, samples, CONTEXT)
    norm = tiny_checkpoint.model.get_submodule(f"{tiny_checkpoint.spec.tower.stack}.0.layer_norm1")
    norm.weight[0] = float("inf")
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn\.q_proj.*not finite"):
        Awq(rules=RULES).apply(tiny_checkpoint, samples, CONTEXT)
    norm.weight[0] = 1
    done = RoundToNearest(rules=(WeightRule(part="tower", bits=4, group_size=16),)).apply(
        tiny_checkpoint, samples, CONTEXT
    )
    with pytest.raises(RecipeError, match="quantized already"):
        Awq(rules=RULES).apply(done, samples, CONTEXT)


def test_an_exported_bundle_passes(tiny_paths, samples, tmp_path: Path):
    checkpoint = Awq(rules=RULES).apply(Checkpoint.load(tiny_paths["smolvlm"]), samples, CONTEXT)
    assert checkpoint.history[-1].metrics["layers_scaled"] > 0
    stage = RoundToNearest(rules=(WeightRule(bits=4, group_size=32),))
    checkpoint = stage.apply(checkpoint, samples, CONTEXT)
    recipe, questions = load_recipe("float"), tuple(samples.take(3))
    built = build_bundle(checkpoint, recipe, (ToOnnx(),), tmp_path / "bundle", questions, CONTEXT)
    assert built.parity.failures() == []
