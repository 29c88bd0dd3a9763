"""set_resolution: pictures of another size, in the processor, the graphs and the answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pocketvlm.bundle import Bundle
from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint, read_model_folder
from pocketvlm.checkpoint.config import read_spec
from pocketvlm.compress.tokens.rank.distinct_features import DistinctFeatures
from pocketvlm.compress.tokens.set_resolution import SetResolution
from pocketvlm.compress.tokens.stage import ReduceTokens
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.pipeline.stock import StockModel
from pocketvlm.processor import user_message
from pocketvlm.prompt.messages import user_turn
from pocketvlm.reference.random_models import tiny_config, write_tiny_model
from pocketvlm.reference_graph.forward import embed_prompts, encode_images, greedy_generate
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.onnx.runner import OnnxRunner
from pocketvlm.stages import PlanState

CONTEXT = RunContext(threads=1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resolution") / "model"
    write_tiny_model("qwen2.5-vl", folder)
    return folder


def resize(checkpoint: Checkpoint, height: int, width: int) -> Checkpoint:
    stage = SetResolution(height=height, width=width)
    planned = stage.plan(PlanState.of_checkpoint(checkpoint))
    done = stage.apply(checkpoint, CalibrationSet.synthetic(1), CONTEXT)
    assert (planned.spec, planned.visual_tokens) == (done.spec, done.spec.visual_tokens)
    return done


def ask(checkpoint: Checkpoint, folder: Path, picture: Image.Image) -> list[int]:
    write_graphs(
        checkpoint, (ToOnnx(accuracy_level=0, tower_accuracy_level=0),), folder, "", CONTEXT
    )
    bundle = Bundle.open(folder)
    endless = replace(bundle.manifest.generation, eos_token_ids=())
    bundle = replace(bundle, manifest=replace(bundle.manifest, generation=endless))
    talk = Conversation(bundle, runner=OnnxRunner(bundle, threads=1))
    return list(talk.ask("what is it?", picture, max_new_tokens=32).token_ids)


def test_answers_at_another_size_are_those_of_the_stock_model(path, tmp_path):
    done = resize(Checkpoint.load(path), 96, 32)
    assert done.history[-1].metrics == {"visual_tokens": 12, "before": 8}
    assert (done.spec.visual_rows, done.spec.visual_columns) == (6, 2)
    done.save(tmp_path / "saved")
    again = Checkpoint.load(tmp_path / "saved")
    assert again.spec == done.spec
    noise = np.random.default_rng(2).integers(0, 256, (70, 130, 3), np.uint8)
    picture = Image.fromarray(noise)
    # Stock has no such setting: the folder as it was, and pictures fitted by the new one.
    stock = StockModel.load(read_model_folder(path))
    stock = replace(stock, fitting=done.processor.image_processor.settings)
    expected = stock.answer([user_turn("what is it?", 1)], [picture], max_new_tokens=32)
    np.testing.assert_array_equal(again.processor.pixels([picture]).numpy(), expected.pixels)
    assert ask(again, tmp_path / "bundle", picture) == expected.generated


def test_kept_tokens_keep_their_rows_and_columns(path, tmp_path):
    """A reducer that keeps every token changes nothing; one that keeps half runs everywhere."""
    checkpoint = resize(Checkpoint.load(path), 64, 64)
    noise = np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8)
    picture = Image.fromarray(noise)
    samples = CalibrationSet.synthetic(1)
    whole = ask(checkpoint, tmp_path / "whole", picture)
    every = ReduceTokens(reducer=DistinctFeatures(), keep=16).apply(checkpoint, samples, CONTEXT)
    assert ask(every, tmp_path / "every", picture) == whole
    half = ReduceTokens(reducer=DistinctFeatures(), keep=8).apply(checkpoint, samples, CONTEXT)
    with torch.inference_mode():
        ids = torch.tensor([half.processor.encode([user_message("what is it?")])])
        visual = encode_images(half, half.processor.pixels([picture]))
        inputs = embed_prompts(half, ids, visual)
        expected = greedy_generate(half, inputs, max_new_tokens=32)
    assert int(inputs.next_position) == ids.shape[1] - 16 + 4
    assert [ask(half, tmp_path / "half", picture)] == expected
    with pytest.raises(RecipeError, match="cannot be recounted; allowed is original"):
        ReduceTokens(keep=8, positions="consecutive").plan(PlanState.of_checkpoint(checkpoint))


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ("qwen2-vl", (40, 64), "64 x 40 pixels is not whole cells of 16 x 16"),
        ("qwen2.5-vl", (48, 64), "64 x 48 pixels is not whole windows of 32 x 32"),
        ("llava", (64, 64), "this model's pictures are 32 x 32 pixels; it takes no other size"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_before_any_compute(model, size, message):
    state = PlanState.of(read_spec(tiny_config(model)))
    with pytest.raises(RecipeError, match=message) as caught:
        SetResolution(height=size[0], width=size[1]).plan(state)
    assert "\n" not in str(caught.value)


def test_the_size_of_a_model_with_one_size_may_be_repeated():
    state = PlanState.of(read_spec(tiny_config("llava")))
    assert SetResolution(height=32, width=32).plan(state) == state
    with pytest.raises(ValueError, match="at least 1 is needed"):
        SetResolution(height=0)
