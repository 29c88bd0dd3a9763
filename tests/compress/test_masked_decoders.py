"""Decoders whose rows see more or less than the past: what works, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pocketvlm.bundle import Bundle
from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.calibration.data.sample import Sample
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.checkpoint.config import read_spec
from pocketvlm.compress.pruning.depth.blocks import spec_without
from pocketvlm.compress.quantization.transforms.rotation import Rotate
from pocketvlm.compress.tokens.schedule.stage import DropTokens
from pocketvlm.context import RunContext
from pocketvlm.errors import BundleError, InputError, RecipeError
from pocketvlm.evaluation.bundle_answers import answer_with_bundle
from pocketvlm.evaluation.torch_answers import answer_with_checkpoint
from pocketvlm.export.coreml.swift import render_swift
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.models.spec import ModelSpec
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.reference.random_models import tiny_config, write_tiny_model
from pocketvlm.reference_graph.forward import embed_prompts, encode_images
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.coreml.runner import CoremlRunner
from pocketvlm.runtime.executorch.native_runner import answer_with_multimodal_runner
from pocketvlm.stages import PlanState
from tests.processor.test_tiles import picture

NAMES = ("paligemma", "paligemma2", "gemma3")


def spec_of(name: str) -> ModelSpec:
    return read_spec(tiny_config(name))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("masked")
    for name in NAMES:
        write_tiny_model(name, root / name)
    return {name: Checkpoint.load(root / name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_visual_rows_do_not_end_early_where_rows_see_others_than_the_past(name):
    with pytest.raises(RecipeError, match=r"^drop_tokens: rows of this decoder see") as caught:
        DropTokens().plan(PlanState.of(spec_of(name)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["paligemma2", "gemma3"])
def test_a_norm_behind_a_sublayer_stops_a_rotation_of_the_stream(name):
    with pytest.raises(RecipeError, match="end with a norm, whose weights no rotation passes"):
        Rotate(untie_head=True).plan(PlanState.of(spec_of(name)))
    Rotate(residual=False).plan(PlanState.of(spec_of(name)))


def test_layers_that_differ_are_not_renumbered():
    for name in ("paligemma2", "gemma3"):
        with pytest.raises(RecipeError, match="differ in how far they see"):
            spec_without(spec_of(name), {"decoder": 1})
        assert spec_without(spec_of(name), {"tower": 1}).tower.depth == 2
    assert spec_without(spec_of("paligemma"), {"decoder": 1}).decoder.depth == 1


def test_a_chunk_that_holds_no_picture_is_refused_where_a_prompt_is_one_whole():
    state = PlanState.of(spec_of("paligemma"))
    assert ToCoreml(chunk=17).refuse(state) == ()
    (reason,) = ToCoreml(chunk=16).refuse(state)
    assert reason == (
        "coreml: all rows of a prompt see each other and come in one call, and a picture has 16; "
        "set chunk (16) to these and the longest question"
    )
    assert ToCoreml(chunk=1).refuse(PlanState.of(spec_of("gemma3"))) == ()


@torch.inference_mode()
def test_an_answer_sees_the_prompt_and_no_row_of_the_prompt_sees_the_answer(checkpoints):
    checkpoint = checkpoints["paligemma"]
    sample = Sample(question="what is it?", image=picture((40, 30)), answer="a thing")
    (prompt,) = encode_samples(checkpoint.processor, [sample])
    visual = encode_images(checkpoint, checkpoint.processor.pixels([sample.open_image()]))
    ids = torch.tensor([prompt.token_ids])
    inputs = embed_prompts(checkpoint, ids, visual, answer_starts=[prompt.answer_start])
    assert inputs.mutual is not None
    start, length = prompt.answer_start, len(prompt.token_ids)
    assert inputs.mutual[0].tolist() == [0] * start + [-1] * (length - start)
    assert length - start == len(checkpoint.processor.tokenizer("a thing").input_ids) + 1


@torch.inference_mode()
def test_rows_of_each_picture_have_a_number_of_their_own(checkpoints):
    checkpoint = checkpoints["gemma3"]
    messages = [{"role": "user", "content": [{"type": "image"}] * 2}]
    ids = torch.tensor([checkpoint.processor.encode(messages)])
    images = [picture((40, 30)), picture((30, 40))]
    visual = encode_images(checkpoint, checkpoint.processor.pixels(images))
    inputs = embed_prompts(checkpoint, ids, visual)
    assert inputs.mutual is not None
    numbers = torch.where(inputs.is_visual, inputs.mutual, -1)
    assert torch.equal(numbers, inputs.mutual)
    assert numbers[inputs.is_visual].tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
def test_a_bundle_is_scored_by_the_answers_that_its_checkpoint_gives(checkpoints, name, tmp_path):
    checkpoint, context = checkpoints[name], RunContext(threads=1)
    target = ToOnnx(accuracy_level=0, tower_accuracy_level=0)
    write_graphs(checkpoint, (target,), tmp_path / "bundle", "", context)
    samples = [
        Sample(question=question, image=picture((40 + 9 * number, 30)), answer="a")
        for number, question in enumerate(("what is it?", "where?", "how many are there?"))
    ]
    asked = {"max_new_tokens": 12, "ctx": context, "task": "answers"}
    ours = answer_with_checkpoint(checkpoint, samples, batch_size=2, **asked)
    assert answer_with_bundle(Bundle.open(tmp_path / "bundle"), samples, **asked) == ours
    assert len({*ours}) > 1


def test_a_prompt_that_no_chunk_holds_is_one_line_and_leaves_the_conversation(
    checkpoints, tmp_path: Path
):
    checkpoint = checkpoints["paligemma"]
    target = ToCoreml(context=128, chunk=32)
    write_graphs(checkpoint, (target,), tmp_path / "bundle", "", RunContext(threads=1))
    bundle = Bundle.open(tmp_path / "bundle")
    with pytest.raises(BundleError, match="some of this model's see later ones"):
        render_swift(bundle)
    endless = replace(bundle.manifest.generation, eos_token_ids=())
    bundle = replace(bundle, manifest=replace(bundle.manifest, generation=endless))
    talk = Conversation(bundle, runner=CoremlRunner(bundle))
    image = picture((40, 30))
    expected = talk.ask("what is it?", image, max_new_tokens=4)
    with pytest.raises(InputError, match="see.* rows that come more than 32 later") as caught:
        talk.ask("and what is right of it, left of the other one?", max_new_tokens=4)
    assert "\n" not in str(caught.value)
    talk.reset()
    assert talk.ask("what is it?", image, max_new_tokens=4).token_ids == expected.token_ids
    with pytest.raises(InputError, match="gives a prompt to the model piece by piece"):
        answer_with_multimodal_runner(bundle, "what is it?", image)
