"""Stages on models whose tiles make up a map, and on towers with features of several blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from pocketvlm.calibration import CalibrationSet, Sample
from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.calibration.gradients.layer_gradients import block_gradients, walk_gradients
from pocketvlm.calibration.walk.steps import FinishedSublayer
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.depth.block_influence import BlockInfluence
from pocketvlm.compress.pruning.depth.stage import PruneDepth
from pocketvlm.compress.quantization.transforms.rotation import Rotate
from pocketvlm.compress.tokens.baseline.fixed import FixedReducer
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.reference_graph.forward import (
    decode_logits,
    embed_prompts,
    encode_images,
)

CONTEXT = RunContext(threads=1)


@pytest.fixture(scope="module", params=["llava-next", "granite-vision"])
def checkpoint(request, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("map") / request.param
    write_tiny_model(request.param, folder)
    return Checkpoint.load(folder)


@pytest.fixture(scope="module")
def samples() -> CalibrationSet:
    found = CalibrationSet.from_reference(0, 3)
    sizes = ((90, 30), (64, 64), (31, 97))
    return CalibrationSet(
        name="map",
        samples=tuple(
            Sample(
                image=sample.open_image().resize(size),
                question=sample.question,
                answer=sample.answer,
            )
            for sample, size in zip(found, sizes, strict=True)
        ),
    )


ROUNDING = 2e-9
"""Of float32 sums that nearly cancel out, by a model's largest gradient; 1.4e-9 was seen."""


def inner_linears(checkpoint: Checkpoint) -> list[str]:
    """Names of all linears between the embedding and the head."""
    parts = ("tower", "projector", "decoder")
    return [linear.name for linear in checkpoint.spec.linears() if linear.part in parts]


@torch.no_grad()
def logits_of(checkpoint: Checkpoint, sample: Sample):
    prompt = encode_samples(checkpoint.processor, CalibrationSet(name="one", samples=(sample,)))[0]
    pixels = checkpoint.processor.pixels([sample.open_image()])
    inputs = embed_prompts(
        checkpoint,
        torch.tensor([prompt.token_ids]),
        encode_images(checkpoint, pixels),
        [prompt.grid],
    )
    return prompt, inputs, decode_logits(checkpoint, inputs)[0]


@pytest.mark.parametrize("reduced", [False, True])
def test_a_walk_sees_what_the_linears_read(checkpoint, samples, reduced):
    """Moments of every linear are those of its inputs in plain forward passes."""
    if reduced:
        checkpoint = replace(checkpoint, reducer=FixedReducer((1, 4, 9, 15), positions="original"))
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for name in inner_linears(checkpoint):

        def add(_module, inputs, name=name):
            seen.setdefault(name, []).append(inputs[0].double().flatten(0, -2))

        hooks.append(checkpoint.layer(name).register_forward_pre_hook(add))
    for sample in samples:
        logits_of(checkpoint, sample)
    for hook in hooks:
        hook.remove()
    met = set()
    for step in BlockWalk(checkpoint=checkpoint, samples=samples, held_out=0.0):
        for name in seen.keys() & set(step.names):
            rows = torch.cat(seen[name])
            (found,) = step.moments(None).calibration.blocks()
            torch.testing.assert_close(
                found.double(), rows.T @ rows / len(rows), rtol=2e-4, atol=1e-5, msg=name
            )
            met.add(name)
    assert met == seen.keys()


def test_gradients_are_those_of_the_whole_model(checkpoint, samples):
    linears = inner_linears(checkpoint)
    expected = {name: torch.zeros(checkpoint.form(name).shape) for name in linears}
    for sample in samples:
        leaves = {}
        for name in linears:
            layer = checkpoint.layer(name)
            layer.cached = leaves[name] = layer.weight.detach().requires_grad_()
        try:
            with torch.enable_grad():
                prompt = encode_samples(
                    checkpoint.processor, CalibrationSet(name="one", samples=(sample,))
                )[0]
                inputs = embed_prompts(
                    checkpoint,
                    torch.tensor([prompt.token_ids]),
                    encode_images(checkpoint, checkpoint.processor.pixels([sample.open_image()])),
                    [prompt.grid],
                )
                logits = decode_logits(checkpoint, inputs)[0]
                answer = torch.tensor(prompt.token_ids[prompt.answer_start : prompt.answer_end])
                loss = functional.cross_entropy(logits[prompt.predicting(len(logits))], answer)
                gradients = torch.autograd.grad(loss, list(leaves.values()))
        finally:
            for name in linears:
                checkpoint.layer(name).cached = None
        for name, gradient in zip(leaves, gradients, strict=True):
            expected[name] += gradient
    found = {name: torch.zeros_like(values) for name, values in expected.items()}
    for part in walk_gradients(checkpoint, samples):
        assert len(part.inputs) == len(part.samples)
        found[part.name] += torch.einsum("nto,nti->oi", part.outputs, part.inputs)
    largest = max(gradient.norm() for gradient in expected.values())
    for name in linears:
        error = (found[name] - expected[name]).norm()
        # Those of granite-vision's queries and keys are a millionth of the largest: what is left of
        # sums that cancel out, whose rounding depends on threads and processor.
        assert error < 1e-4 * expected[name].norm() + ROUNDING * largest, name


def test_regional_gradients_are_those_of_a_block_alone(checkpoint, samples):
    named = {part.name for part in block_gradients(checkpoint, samples)}
    assert named == set(inner_linears(checkpoint))


def test_sublayers_are_compared_without_what_they_carry(checkpoint, samples):
    width = checkpoint.spec.tower.hidden_size
    carried = 0
    for step in BlockWalk(checkpoint=checkpoint, samples=samples, carry_float=True):
        if isinstance(step, FinishedSublayer):
            target = step.targets[0]
            carried += target.shape[-1] > width
            assert step.sublayer.own(target).shape[-1] == step.sublayer.width
    assert (carried > 0) == bool(checkpoint.spec.tower.earlier_features)


def test_a_rotated_model_computes_the_same(samples, tmp_path):
    write_tiny_model("llava-next", tmp_path / "model")
    own = Checkpoint.load(tmp_path / "model")
    before = own.model.get_parameter(own.spec.line_break).clone()
    _, _, expected = logits_of(own, samples.samples[0])
    turned = Rotate().apply(own, samples, CONTEXT)
    _, _, found = logits_of(turned, samples.samples[0])
    assert (found - expected).norm() / expected.norm() < 1e-4
    assert not torch.equal(turned.model.get_parameter(own.spec.line_break), before)


def test_blocks_of_a_tower_with_several_features_stay(checkpoint, samples, tmp_path):
    checkpoint.save(tmp_path / "copy")
    own = Checkpoint.load(tmp_path / "copy")
    pruned = PruneDepth(decoder_blocks=1, importance=BlockInfluence()).apply(own, samples, CONTEXT)
    assert pruned.spec.decoder.depth == checkpoint.spec.decoder.depth - 1
    if checkpoint.spec.tower.earlier_features:
        with pytest.raises(RecipeError, match="features are taken after several of its blocks"):
            PruneDepth(tower_blocks=1).spec_after(checkpoint.spec)
