"""What every family promises: stock's answers in torch, and torch's answers in the artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.checkpoint.config import read_spec
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.models.families.table import FAMILIES
from pocketvlm.pipeline.source_check import BOUNDS, verify_folder
from pocketvlm.processor import user_message
from pocketvlm.reference.random_models import TINY_MODELS, tiny_config, write_tiny_model
from pocketvlm.reference_graph.forward import (
    decode_logits,
    embed_prompts,
    encode_images,
    greedy_generate,
)
from tests.export.rig import make_prompt, open_session


@pytest.fixture(scope="module", params=TINY_MODELS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family") / request.param
    write_tiny_model(request.param, folder)
    return folder


def test_every_reader_has_a_tiny_model():
    read = {read_spec(tiny_config(name)).family for name in TINY_MODELS}
    assert read == {FAMILIES[name].__name__.removeprefix("read_") for name in FAMILIES}


def test_the_source_check_passes_to_the_last_bit(path):
    report = verify_folder(path)
    assert report.verdict == "passed", report.lines()
    assert {check.metric for check in report.checks} == set(BOUNDS)
    for check in report.checks:
        assert check.value == (1.0 if check.metric.endswith("_equal") else 0.0), check


@torch.inference_mode()
def test_logits_and_answers_are_those_of_the_stock_model(path):
    from transformers import AutoModelForImageTextToText

    checkpoint = Checkpoint.load(path)
    stock = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    picture, processor = Image.fromarray(noise), checkpoint.processor
    pixels = processor.pixels([picture])
    grids = [processor.image_processor.settings.grid(*picture.size)]
    ids = torch.tensor([processor.encode([user_message("what is it?")], grids)])
    inputs = embed_prompts(checkpoint, ids, encode_images(checkpoint, pixels))
    images = pixels if checkpoint.spec.family == "llava" else pixels[None]
    expected = stock(input_ids=ids, pixel_values=images).logits
    torch.testing.assert_close(decode_logits(checkpoint, inputs), expected, rtol=0, atol=1e-6)
    generated = stock.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=images,
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
    )
    answers = greedy_generate(checkpoint, inputs, max_new_tokens=32)
    assert answers == generated[:, ids.shape[1] :].tolist()


def test_every_linear_and_norm_of_the_spec_is_one_of_the_model(path):
    checkpoint = Checkpoint.load(path)
    modules = dict(checkpoint.model.named_modules())
    for linear in checkpoint.spec.linears():
        module = modules[linear.name]
        assert module.form.shape == (linear.out_features, linear.in_features)
        assert (getattr(module, "bias", None) is not None) == linear.has_bias, linear.name
    for norm in checkpoint.spec.norms():
        module = modules[norm.name]
        assert module.weight.shape == (norm.width,)
        assert (getattr(module, "bias", None) is not None) == norm.has_bias


@pytest.mark.parametrize("accuracy_level", [0])
def test_the_onnx_graphs_compute_what_torch_computes(path, tmp_path, accuracy_level):
    checkpoint = Checkpoint.load(path)
    target = ToOnnx(accuracy_level=accuracy_level, tower_accuracy_level=accuracy_level)
    predicted = target.predict(checkpoint.spec, {})
    assert predicted.refused == ()
    target.export(checkpoint, tmp_path, RunContext(threads=1))
    pixels, visual, _ = make_prompt(checkpoint)
    embeds, indices = open_session(tmp_path, "vision").run(None, {"pixel_values": pixels.numpy()})
    reference = visual.embeds.numpy().astype(np.float64)
    assert np.abs(embeds - reference).max() < 2e-5 * np.abs(reference).max()
    np.testing.assert_array_equal(indices, visual.indices)


def test_a_saved_checkpoint_is_the_same_model(path, tmp_path):
    checkpoint = Checkpoint.load(path)
    checkpoint.save(tmp_path / "saved")
    again = Checkpoint.load(tmp_path / "saved")
    assert asdict(again.spec) == asdict(checkpoint.spec)
    before, after = checkpoint.vectors(), again.vectors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
