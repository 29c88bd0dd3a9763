"""Rotations: the float model stays what it is, and outliers are spread over all channels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint, read_spec
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest, round_to_nearest
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.kv_cache import QuantizeCache
from pocketvlm.compress.quantization.transforms.orthogonal import (
    fix_ones,
    hadamard,
    random_orthogonal,
    random_rotation,
)
from pocketvlm.compress.quantization.transforms.rotation import Rotate
from pocketvlm.compress.tokens import ReduceTokens
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import build_bundle
from pocketvlm.pipeline.plan import plan
from pocketvlm.recipes.load import load_recipe, recipe_from_document
from pocketvlm.weights.dense import DenseWeight
from tests.compress.quantization.functions import logits_of, relative_error, stored_bytes_of

CONTEXT = RunContext(threads=1)
WIDTHS = (1, 2, 7, 12, 16, 20, 56, 64, 192, 576, 768, 960)


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet.from_reference(0, 3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def is_orthogonal(matrix):
    identity = torch.eye(len(matrix), dtype=torch.float64)
    return torch.allclose(matrix.T @ matrix, identity, atol=1e-9)


@pytest.mark.parametrize("width", WIDTHS)
def test_hadamard_matrices_are_flat_and_orthogonal(width):
    matrix, rest = hadamard(width)
    assert len(matrix) * rest == width
    assert is_orthogonal(matrix)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, len(matrix) ** -0.5))
    if width in (12, 16, 20, 64, 192, 576, 768, 960):
        assert rest == 1


@given(width=st.integers(1, 200), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_rotations_are_orthogonal_and_seeded(width, seed):
    rotation = random_rotation(width, generator(seed))
    assert rotation.shape == (width, width)
    assert is_orthogonal(rotation)
    assert torch.equal(rotation, random_rotation(width, generator(seed)))
    kept = fix_ones(rotation)
    ones = torch.ones(width, dtype=torch.float64)
    assert is_orthogonal(kept)
    assert torch.allclose(kept @ ones, ones)
    assert torch.allclose(ones @ kept, ones)
    assert is_orthogonal(random_orthogonal(width, generator(seed)))


def test_fixing_ones_leaves_what_fixes_them_already():
    identity = torch.eye(5, dtype=torch.float64)
    assert torch.equal(fix_ones(identity), identity)


def test_a_rotation_spreads_an_outlier():
    spike = torch.zeros(192, dtype=torch.float64)
    spike[17] = 1
    turned = spike @ random_rotation(192, generator())
    assert float(turned.abs().max()) == pytest.approx(192**-0.5)
    assert float((spike @ fix_ones(random_rotation(192, generator()))).abs().max()) < 0.4


@pytest.mark.parametrize("reduced", [False, True], ids=["all_tokens", "reduced"])
def test_the_float_model_computes_what_it_did(tiny_checkpoint, samples, reduced):
    checkpoint = tiny_checkpoint
    if reduced:
        checkpoint = ReduceTokens(keep=0.5).apply(checkpoint, samples, CONTEXT)
    expected = logits_of(checkpoint)
    done = Rotate(untie_head=True).apply(checkpoint, samples, CONTEXT)
    assert relative_error(logits_of(done), expected) < 1e-5
    record = done.history[-1]
    turns_tower = done.spec.family == "idefics3" and not reduced
    expected_metrics = {"residual": True, "heads": True, "tower": turns_tower}
    assert {key: record.metrics[key] for key in expected_metrics} == expected_metrics
    if not turns_tower:
        reason = "reducer" if done.spec.family == "idefics3" else "norm with weights"
        assert any("tower not rotated" in note and reason in note for note in record.notes)
    rows = {row["name"]: row for row in record.layers}
    assert rows.keys() == {linear.name for linear in done.spec.linears()}
    block = f"{done.spec.decoder.stack}.1"
    assert rows[f"{block}.self_attn.v_proj"]["inputs"] == "residual"
    assert rows[f"{block}.self_attn.v_proj"]["outputs"] == "heads"
    assert rows[f"{block}.mlp.down_proj"]["inputs"] is None
    assert rows[done.spec.projector.linears[-1]]["outputs"] == "residual"
    assert rows[done.spec.decoder.embedding]["outputs"] == "residual"
    json.dumps([record.layers, record.metrics, record.parameters], allow_nan=False)


@pytest.mark.parametrize("which", ["residual", "heads", "tower"])
def test_each_rotation_alone_keeps_the_function(tiny_paths, samples, which):
    checkpoint = Checkpoint.load(tiny_paths["smolvlm"])
    before = {linear: form.dequantize() for linear, form in checkpoint.forms().items()}
    expected = logits_of(checkpoint)
    wanted = {name: name == which for name in ("residual", "heads", "tower")}
    done = Rotate(**wanted).apply(checkpoint, samples, CONTEXT)
    assert relative_error(logits_of(done), expected) < 1e-5
    roles = {
        "residual": {"embed_tokens", "proj", "lm_head", "q_proj", "o_proj", "down_proj"},
        "heads": {"v_proj", "o_proj", "out_proj"},
        "tower": {"q_proj", "out_proj", "fc1", "fc2", "proj"},
    }
    changed = {
        linear.role
        for linear, weight in before.items()
        if relative_error(done.form(linear.name).dequantize(), weight) > 0.5
    }
    assert changed >= roles[which]


def test_weights_are_those_of_the_formula(tiny_checkpoint, samples):
    """One query and one output weight of the decoder, and what one head's value becomes."""
    decoder = tiny_checkpoint.spec.decoder
    path = f"{decoder.stack}.0"
    names = {role: f"{path}.self_attn.{role}_proj" for role in "qo"} | {"table": decoder.embedding}
    before = {key: tiny_checkpoint.form(name).dequantize().double() for key, name in names.items()}
    gamma = tiny_checkpoint.model.get_submodule(f"{path}.input_layernorm").weight.double().clone()
    done = Rotate(untie_head=True, heads=False).apply(tiny_checkpoint, samples, CONTEXT)
    after = {key: done.form(name).dequantize().double() for key, name in names.items()}
    # The table tells what the rotation is; the others have to agree with it.
    R = torch.linalg.lstsq(before["table"], after["table"]).solution
    width = decoder.hidden_size
    assert torch.allclose(R.T @ R, torch.eye(width, dtype=torch.float64), atol=1e-4)
    for row in (0, 5):
        for column in range(width):
            turned = sum(before["q"][row, i] * gamma[i] * R[i, column] for i in range(width))
            assert float(after["q"][row, column]) == pytest.approx(float(turned), abs=1e-4)
    assert torch.allclose(after["o"], R.T @ before["o"], atol=1e-4)
    assert bool((done.model.get_submodule(f"{path}.input_layernorm").weight == 1).all())


def test_query_heads_of_a_group_share_the_rotation_of_their_value_head(tiny_checkpoint, samples):
    decoder = tiny_checkpoint.spec.decoder
    path = f"{decoder.stack}.0.self_attn"
    before = {
        role: tiny_checkpoint.form(f"{path}.{role}_proj").dequantize().double() for role in "vo"
    }
    done = Rotate(residual=False, tower=False).apply(tiny_checkpoint, samples, CONTEXT)
    after = {role: done.form(f"{path}.{role}_proj").dequantize().double() for role in "vo"}
    repeats, width = decoder.heads // decoder.kv_heads, decoder.head_dim
    assert repeats > 1
    turns = []
    for head in range(decoder.heads):
        columns = slice(head * width, (head + 1) * width)
        turn = torch.linalg.lstsq(before["o"][:, columns], after["o"][:, columns]).solution
        turns.append(turn)
        group = head // repeats
        rows = slice(group * width, (group + 1) * width)
        assert torch.allclose(after["v"][rows], turn.T @ before["v"][rows], atol=1e-5)
        assert torch.allclose(turn, turns[group * repeats], atol=1e-5)
    assert not torch.allclose(turns[0], turns[-1], atol=1e-2)


def test_a_tied_head_is_refused_or_untied(tiny_paths, samples, tmp_path):
    checkpoint = Checkpoint.load(tiny_paths["llava"])
    expected = logits_of(checkpoint)
    with pytest.raises(RecipeError, match=r"untie_head: true, which stores 20,480 weights more"):
        Rotate().apply(checkpoint, samples, CONTEXT)
    assert torch.equal(logits_of(checkpoint), expected)
    done = Rotate(untie_head=True).apply(checkpoint, samples, CONTEXT)
    assert done.history[-1].metrics["untied_head_bytes"] == 20_480 * 4
    assert not done.spec.decoder.tied_head
    assert (
        read_spec(done.config) == done.spec == Rotate(untie_head=True).spec_after(checkpoint.spec)
    )
    assert done.spec.decoder.head in {linear.name for linear in done.spec.linears()}
    rotated = done.form(done.spec.decoder.embedding).dequantize()
    assert not torch.equal(done.form(done.spec.decoder.head).dequantize(), rotated)
    kept = Rotate(residual=False).apply(Checkpoint.load(tiny_paths["llava"]), samples, CONTEXT)
    assert kept.spec.decoder.tied_head
    assert kept.history[-1].metrics["untied_head_bytes"] == 0


def test_a_plan_knows_the_head_that_a_rotation_adds(tiny_paths):
    def document(**options):
        rotation = {"method": "rotate", **options}
        rules = [{"part": "head", "bits": 8}, {"match": ".*", "bits": 4}]
        stages = [rotation, {"method": "awq", "rules": rules}, {"method": "rtn", "rules": rules}]
        targets = [{"method": "onnx"}]
        return {"schema": 1, "name": "turned", "stages": stages, "targets": targets}

    recipe = recipe_from_document(document(untie_head=True), where="test")
    parts = plan(tiny_paths["llava"], recipe).part_bytes
    assert 1.5 * parts["embedding"] < parts["head"] < 2 * parts["embedding"]
    with pytest.raises(RecipeError, match="untie_head"):
        plan(tiny_paths["llava"], recipe_from_document(document(), where="test"))


def test_a_norm_whose_bias_cannot_be_folded_keeps_the_tower(tiny_paths, samples):
    checkpoint = Checkpoint.load(tiny_paths["smolvlm"])
    norm = checkpoint.model.get_submodule(f"{checkpoint.spec.tower.prefix}.post_layernorm")
    norm.weight[3] = 0
    expected = logits_of(checkpoint)
    done = Rotate().apply(checkpoint, samples, CONTEXT)
    assert relative_error(logits_of(done), expected) < 1e-5
    assert not done.history[-1].metrics["tower"]
    assert any("almost no weight" in note for note in done.history[-1].notes)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_a_rotated_layer_costs_less(bits):
    weight = torch.randn(96, 192, generator=generator(5))
    weight[:, [3, 50, 111]] *= 40
    rotated = (weight.double() @ random_rotation(192, generator(6))).float()
    rule = WeightRule(bits=bits, group_size=64)
    plain = rtn_error(weight, rule)
    assert rtn_error(rotated, rule) < 0.5 * plain
    kept_mean = (weight.double() @ fix_ones(random_rotation(192, generator(6)))).float()
    assert rtn_error(kept_mean, rule) < 0.8 * plain


def rtn_error(weight, rule):
    form, _ = round_to_nearest(
        DenseWeight(values=weight), scheme=rule.scheme, group_size=rule.group_size
    )
    return float((form.dequantize() - weight).square().sum())


def test_rounding_a_rotated_model_changes_its_answers_less(tiny_paths, samples):
    rules = (WeightRule(part="decoder", bits=4, group_size=32),)
    errors = {}
    for name, stages in {
        "rtn": [RoundToNearest(rules=rules)],
        "rotated": [Rotate(tower=False), RoundToNearest(rules=rules)],
    }.items():
        checkpoint = Checkpoint.load(tiny_paths["smolvlm"])
        for linear, form in checkpoint.forms().items():
            if linear.part == "decoder" and linear.role in ("o_proj", "down_proj"):
                # A few channels of the residual stream are much larger than the others.
                values = form.dequantize()
                values[5::16] *= 8
                checkpoint.set_form(linear.name, DenseWeight(values=values))
            elif linear.part == "decoder":
                values = form.dequantize()
                values[:, 5::16] *= 8
                checkpoint.set_form(linear.name, DenseWeight(values=values))
        expected = logits_of(checkpoint)
        for stage in stages:
            checkpoint = stage.apply(checkpoint, samples, CONTEXT)
        errors[name] = relative_error(logits_of(checkpoint), expected)
    assert errors["rotated"] < 0.8 * errors["rtn"]


def test_a_saved_checkpoint_comes_back_to_the_same_logits(tiny_checkpoint, samples, tmp_path):
    done = Rotate(untie_head=True).apply(tiny_checkpoint, samples, CONTEXT)
    done.save(tmp_path / "saved")
    again = Checkpoint.load(tmp_path / "saved")
    assert again.spec == done.spec
    assert stored_bytes_of(again) == stored_bytes_of(done)
    assert torch.equal(logits_of(again), logits_of(done))


def test_the_same_bytes_for_a_seed(tiny_path, samples):
    def run(**options):
        stage = Rotate(untie_head=True, **options)
        return stored_bytes_of(stage.apply(Checkpoint.load(tiny_path), samples, CONTEXT))

    first = run(seed=3)
    assert run(seed=3) == first
    other = run(seed=4)
    assert other.keys() == first.keys()
    assert other != first
    # Leaving one rotation out does not change the others.
    table = next(name for name in first if "embed_tokens" in name)
    assert run(seed=3, heads=False)[table] == first[table]


def test_a_quantized_cache_is_left_alone(tiny_checkpoint, samples):
    done = QuantizeCache().apply(tiny_checkpoint, samples, CONTEXT)
    with pytest.raises(RecipeError, match="comes before quantize_cache"):
        Rotate(untie_head=True).apply(done, samples, CONTEXT)


def test_wrong_input_is_named(tiny_checkpoint, samples):
    with pytest.raises(ValueError, match="nothing would be rotated"):
        Rotate(residual=False, heads=False, tower=False)
    with pytest.raises(ValueError, match="untie_head"):
        Rotate(residual=False, untie_head=True)
    done = RoundToNearest(rules=(WeightRule(part="tower", bits=4, group_size=16),)).apply(
        tiny_checkpoint, samples, CONTEXT
    )
    with pytest.raises(RecipeError, match="quantized already"):
        Rotate(untie_head=True).apply(done, samples, CONTEXT)


def test_an_exported_bundle_passes(tiny_path, samples, tmp_path: Path):
    checkpoint = Rotate(untie_head=True).apply(Checkpoint.load(tiny_path), samples, CONTEXT)
    stage = RoundToNearest(rules=(WeightRule(bits=4, group_size=32),))
    checkpoint = stage.apply(checkpoint, samples, CONTEXT)
    recipe, questions = load_recipe("float"), tuple(samples)
    built = build_bundle(checkpoint, recipe, (ToOnnx(),), tmp_path / "bundle", questions, CONTEXT)
    assert built.parity.failures() == []
