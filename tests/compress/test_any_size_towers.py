"""What stages make of towers with rotary positions and windows, and of positions on three axes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pocketvlm.bundle import Bundle
from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.data.decoder_inputs import embed_samples
from pocketvlm.calibration.walk.partial_forward import PartialForward
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.depth.stage import PruneDepth
from pocketvlm.compress.pruning.width.stage import PruneWidth
from pocketvlm.compress.pruning.width.unit_scores import UnitMagnitude
from pocketvlm.compress.quantization.affine.awq import Awq
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.transforms.rotation import Rotate
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.export.parity.metrics import relative_error
from pocketvlm.export.torch_runner import TorchRunner
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.pipeline.plan import plan_stages
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.processor import user_message
from pocketvlm.recipes.load import recipe_from_document
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.reference_graph.forward import decode_logits, embed_prompts, encode_images
from pocketvlm.runtime.onnx.runner import OnnxRunner
from pocketvlm.stages import PlanState
from pocketvlm.weights.form import total_stored_bytes

CONTEXT = RunContext(threads=1)


@pytest.fixture(scope="module", params=["qwen2-vl", "qwen2.5-vl", "glm-ocr", "paddleocr-vl"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers") / request.param
    write_tiny_model(request.param, folder)
    return folder


@torch.inference_mode()
def logits(checkpoint: Checkpoint) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    processor = checkpoint.processor
    visual = encode_images(checkpoint, processor.pixels([Image.fromarray(noise)]))
    ids = torch.tensor([processor.encode([user_message("what is it?")])])
    return decode_logits(checkpoint, embed_prompts(checkpoint, ids, visual))[0].numpy()


TURNED = {"qwen2-vl": "tower", "qwen2.5-vl": "tower", "glm-ocr": "tower", "paddleocr-vl": "heads"}
"""How much of the tower: all of it, unless a norm with weights stands before the projector."""


def test_rotations_change_no_answer(path):
    source = load_checkpoint(path)
    before, spec = logits(source), source.spec
    # Norms after sublayers keep the residual stream as it is.
    has_post_norms = any(block.ffn.post_norm is not None for block in spec.decoder.blocks)
    stage = Rotate(untie_head=spec.decoder.tied_head, residual=not has_post_norms)
    done = stage.apply(source, CalibrationSet.synthetic(1), CONTEXT)
    if spec.decoder.tied_head:
        assert done.history[-1].notes[0].startswith("the head became a separate matrix")
    turned = {row["name"] for row in done.history[-1].layers if row["method"] == "rotate"}
    tower = {linear.name for linear in done.spec.linears() if linear.part == "tower"}
    if TURNED[path.name] == "tower":
        assert tower <= turned
    else:
        assert any("a norm with weights" in note for note in done.history[-1].notes)
        values = {block.attention.v for block in spec.tower.blocks}
        assert values <= turned & tower < tower
    assert relative_error(logits(done), before) < 1e-5


def test_scales_change_no_answer(path):
    source = load_checkpoint(path)
    before, samples = logits(source), CalibrationSet.from_reference(0, 2)
    stage = Awq(rules=(WeightRule(match=".*", bits=3, group_size=16),), grid_points=4)
    done = stage.apply(source, samples, CONTEXT)
    rows = done.history[-1].layers
    scaled = {row["name"] for row in rows if row["method"] == "awq"}
    # Every projector is among them, if a norm or a gate stands before one of its linears.
    assert scaled & set(done.spec.projector.linears)
    assert relative_error(logits(done), before) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gptq", "rules": [{"bits": 4, "group_size": 16}]},
        {"method": "codebook", "rules": [{"index_bits": 3, "vector_length": 2}], "rounds": 1},
        {"method": "prune", "score": {"kind": "wanda"}},
    ],
    ids=lambda options: options["method"],
)
def test_every_linear_is_compressed_as_planned_and_saved(path, tmp_path, options):
    document = {"schema": 1, "name": "one", "stages": [options]}
    (stage,) = recipe_from_document(document, where="one").stages
    source = load_checkpoint(path)
    planned = stage.plan(PlanState.of(source.spec))
    done = stage.apply(source, CalibrationSet.from_reference(0, 2), CONTEXT)
    found = {linear: form.layout for linear, form in done.forms().items()}
    # Which layers share codebooks is decided by what that costs.
    assert {linear: type(layout) for linear, layout in found.items()} == {
        linear: type(layout) for linear, layout in planned.layouts.items()
    }
    assert all(layout is not None for linear, layout in found.items() if linear.part == "tower")
    done.save(tmp_path / "saved")
    again = load_checkpoint(tmp_path / "saved")
    assert again.spec == done.spec
    np.testing.assert_array_equal(logits(again), logits(done))


def test_scores_of_tokens_are_those_of_normed_heads(tmp_path):
    """What ranks them is what the tower's attention multiplies, on the phone as in torch."""
    write_tiny_model("glm-ocr", tmp_path / "glm-ocr")
    half = {"method": "reduce_tokens", "reducer": {"kind": "received_attention"}, "keep": 4}
    document = {"schema": 1, "name": "half", "stages": [half]}
    (stage,) = recipe_from_document(document, where="half").stages
    reduced = stage.apply(
        load_checkpoint(tmp_path / "glm-ocr"), CalibrationSet.synthetic(1), CONTEXT
    )
    artifact = tmp_path / "bundle"
    exact = ToOnnx(accuracy_level=0, tower_accuracy_level=0)
    write_graphs(reduced, (exact,), artifact, "", CONTEXT)
    onnx = OnnxRunner(Bundle.open(artifact), threads=1)
    noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    pixels = reduced.processor.pixels([Image.fromarray(noise)])
    for block in reduced.spec.tower.blocks:  # otherwise norms would change no order
        weight = reduced.model.get_submodule(block.attention.q_norm or "").weight
        assert not torch.equal(weight, weight[:1].expand_as(weight))
    found, expected = onnx.encode_image(pixels.numpy()), encode_images(reduced, pixels)
    np.testing.assert_array_equal(found[1], expected.indices)
    np.testing.assert_allclose(found[0], expected.embeds, atol=1e-5)


@pytest.fixture(scope="module")
def tapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taps") / "qwen3-vl"
    write_tiny_model("qwen3-vl", folder)
    return folder


def test_rows_that_the_tower_adds_are_calibrated_and_taken_by_the_same_indices(tapped, tmp_path):
    source = load_checkpoint(tapped)
    document = {
        "schema": 1,
        "name": "half",
        "stages": [
            {"method": "reduce_tokens", "reducer": {"kind": "distinct_features"}, "keep": 4},
            {"method": "gptq", "rules": [{"bits": 8, "group_size": 16}]},
        ],
    }
    half, gptq = recipe_from_document(document, where="half").stages
    samples = CalibrationSet.from_reference(0, 2)
    reduced = half.apply(source, samples, CONTEXT)
    before = logits(reduced)
    runner, artifact = TorchRunner(reduced), tmp_path / "bundle"
    write_graphs(
        reduced, (ToOnnx(accuracy_level=0, tower_accuracy_level=0),), artifact, "", CONTEXT
    )
    onnx = OnnxRunner(Bundle.open(artifact), threads=1)
    noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    pixels = reduced.processor.pixels([Image.fromarray(noise)]).numpy()
    found, expected = onnx.encode_image(pixels), runner.encode_image(pixels)
    assert expected[0].shape == (1, 4, reduced.spec.row_width) == (1, 4, 3 * 64)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    done = gptq.apply(reduced, samples, CONTEXT)
    layers = {row["name"] for row in done.history[-1].layers}
    assert {linear.name for linear in done.spec.linears()} <= layers
    # Eight bits leave answers nearly as they were; rows that were left out would not.
    assert relative_error(logits(done), before) < 0.05
    done.save(tmp_path / "saved")
    np.testing.assert_array_equal(logits(load_checkpoint(tmp_path / "saved")), logits(done))


EIGHT_BITS = {"bits": 8, "group_size": 16}
CARRYING = {
    "awq": {"rules": [EIGHT_BITS], "grid_points": 3},
    "codebook": {"rules": [{"match": ".*", "index_bits": 8, "vector_length": 1}], "rounds": 2},
    "mixed": {"options": [EIGHT_BITS], "average_bits": 12.0, "samples": 2},
    "prune": {"score": {"kind": "wanda"}, "ratio": 0.02},
    "sparsegpt_gptq": {"rules": [EIGHT_BITS], "ratio": 0.02},
}
"""Stages with options that leave answers nearly as they were."""


@pytest.mark.parametrize("method", CARRYING)
def test_stages_that_carry_these_rows_change_little_where_little_is_taken(tapped, tmp_path, method):
    """Weights of another model's inputs would change more, and so would rows that are left out."""
    source = load_checkpoint(tapped)
    before = logits(source)
    document = {"schema": 1, "name": "one", "stages": [{"method": method, **CARRYING[method]}]}
    stages = recipe_from_document(document, where="one").stages
    planned = plan_stages(stages, source.spec)
    done = stages[0].apply(source, CalibrationSet.from_reference(0, 4), CONTEXT)
    found = logits(done)
    assert 0 < relative_error(found, before) < 0.08
    if method != "mixed":  # planned only to the same budget
        made = {key: layout for key, layout in planned.layouts.items() if layout is not None}
        assert total_stored_bytes(done.forms()[linear] for linear in made) == sum(
            layout.stored_bytes(*done.forms()[linear].shape) for linear, layout in made.items()
        )
    done.save(tmp_path / "saved")
    np.testing.assert_array_equal(logits(load_checkpoint(tmp_path / "saved")), found)


def test_channels_are_removed_beside_these_rows(tapped, tmp_path):
    source = load_checkpoint(tapped)
    stage = PruneWidth(ffn_ratio=0.3, biases=False)
    planned = plan_stages((stage,), source.spec)
    done = stage.apply(source, CalibrationSet.from_reference(0, 2), CONTEXT)
    assert [x.shape for x in done.spec.linears()] == [x.shape for x in planned.layouts]
    assert done.spec.decoder.ffn_size == 64
    done.save(tmp_path / "saved")
    np.testing.assert_array_equal(logits(load_checkpoint(tmp_path / "saved")), logits(done))


def test_sensitivity_is_measured_with_these_rows(tapped):
    """What the model runs piece by piece is what it runs at once."""
    checkpoint, samples = load_checkpoint(tapped), CalibrationSet.from_reference(0, 2)
    runner = PartialForward(checkpoint, samples)
    for row, prompt in enumerate(runner.prompts):
        visual = encode_images(checkpoint, samples.pixels(checkpoint.processor, [row]))
        inputs = embed_samples(checkpoint, runner.prompts, [row], visual)
        answer = slice(prompt.answer_start - 1, prompt.answer_end - 1)
        whole = decode_logits(checkpoint, inputs)[0, answer]
        torch.testing.assert_close(runner.logits[row], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "rotate"},
        {"method": "distill"},
        {"method": "prune_depth", "decoder_blocks": 1},
        {"method": "prune", "score": {"kind": "gblm"}},
        {"method": "prune", "score": {"kind": "wanda"}, "update": "regression"},
        {"method": "gptq", "rules": [EIGHT_BITS], "drift_share": 0.5},
    ],
)
def test_stages_that_do_not_carry_these_rows_are_refused_by_a_plan(tapped, options):
    spec = load_checkpoint(tapped).spec
    document = {"schema": 1, "name": "one", "stages": [options]}
    stages = recipe_from_document(document, where="one").stages
    with pytest.raises(RecipeError, match="2 blocks of the tower add rows") as caught:
        plan_stages(stages, spec)
    assert "\n" not in str(caught.value)


def test_weights_by_gradient_of_rows_that_are_not_carried_are_refused_by_a_plan(tapped, path):
    rule = {"bits": 4, "group_size": 16}
    gptq = {"method": "gptq", "rules": [rule], "modality_weights": "gradient"}
    document = {"schema": 1, "name": "one", "stages": [gptq]}
    stages = recipe_from_document(document, where="one").stages
    with pytest.raises(RecipeError, match="gptq: modality_weights 'gradient'.*uniform") as caught:
        plan_stages(stages, load_checkpoint(tapped).spec)
    assert "\n" not in str(caught.value)
    plan_stages(stages, load_checkpoint(path).spec)


def test_biases_that_a_stock_class_has_no_place_for_are_refused_by_a_plan(path):
    """What makes up for removed channels goes into biases, where the decoder's class has them."""
    source = load_checkpoint(path)
    stage = PruneWidth(ffn_ratio=0.3, importance=UnitMagnitude())
    if source.spec.decoder.has_mlp_bias:
        plan_stages((stage,), source.spec)
    else:
        with pytest.raises(RecipeError, match="prune_width: biases: .*feed-forward") as caught:
            plan_stages((stage,), source.spec)
        assert "\n" not in str(caught.value)
        stage = replace(stage, biases=False)
    done = stage.apply(source, CalibrationSet.from_reference(0, 2), CONTEXT)
    planned = plan_stages((stage,), load_checkpoint(path).spec)
    assert [x.shape for x in done.spec.linears()] == [x.shape for x in planned.layouts]
    assert done.spec.decoder.ffn_size == 64
    assert np.isfinite(logits(done)).all()


def test_blocks_of_such_a_tower_are_not_removed(path):
    state = PlanState.of(load_checkpoint(path).spec)
    with pytest.raises(RecipeError, match="decoder_blocks alone is possible") as caught:
        PruneDepth(tower_blocks=1).plan(state)
    assert "\n" not in str(caught.value)
    assert PruneDepth(decoder_blocks=1).plan(state).spec.decoder.depth == 1
