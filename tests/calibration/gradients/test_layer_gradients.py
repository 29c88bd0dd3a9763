"""Gradients of every linear, block by block, against one backward pass of the stock model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from pocketvlm.bundle import VisualSchedule
from pocketvlm.calibration import CalibrationSet, Sample
from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.calibration.gradients import layer_gradients
from pocketvlm.calibration.gradients.layer_gradients import block_gradients, walk_gradients
from pocketvlm.calibration.walk import activations
from pocketvlm.errors import CalibrationError, RecipeError
from pocketvlm.models.reducer import TokenReducer
from pocketvlm.weights.modules import FormEmbedding, FormLinear


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet.from_reference(3, 5)


def collect(walk):
    """Weight gradients by (layer, sample), and layers in the order in which they ended."""
    found, finished = {}, []
    for step in walk:
        assert step.name not in finished
        for row, sample in enumerate(step.samples):
            assert (step.name, sample) not in found
            found[step.name, sample] = step.outputs[row].T @ step.inputs[row]
        if step.is_last:
            finished.append(step.name)
    return found, finished


def pruned_names(checkpoint):
    parts = ("tower", "projector", "decoder")
    return [linear.name for linear in checkpoint.spec.linears() if linear.part in parts]


def stock_runs(checkpoint, path, samples):
    """The stock model in float64, its weights by name, and its logits sample by sample."""
    from transformers import AutoModelForImageTextToText

    stock = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64).eval()
    stock.requires_grad_(requires_grad=False)
    weights = {name: stock.get_submodule(name).weight for name in pruned_names(checkpoint)}
    for weight in weights.values():
        weight.requires_grad_()

    def logits(sample, prompt):
        pixels = checkpoint.processor.pixels([sample.open_image()]).double()
        images = pixels if checkpoint.spec.family == "llava" else pixels[:, None]
        return stock(input_ids=torch.tensor([prompt.token_ids]), pixel_values=images).logits[0]

    prompts = encode_samples(checkpoint.processor, samples)
    pairs = zip(samples, prompts, strict=True)
    return stock, weights, ((prompt, logits(sample, prompt)) for sample, prompt in pairs)


def assert_near(found, expected, message):
    scale = float(expected.abs().max())
    assert scale > 0, message
    # Gradients of attention's scores are small differences of large sums: in float32 the stock
    # model itself is no nearer to its float64 at queries and keys.
    bound = 5e-4 if ".q_proj" in message or ".k_proj" in message else 1e-5
    assert float((found.double() - expected).abs().max()) < bound * scale, message


@pytest.mark.parametrize("batch_tokens", [64, 1024])
def test_gradients_are_those_of_the_stock_model(
    tiny_checkpoint, tiny_path, samples, monkeypatch, batch_tokens
):
    monkeypatch.setattr(layer_gradients, "_BATCH_TOKENS", batch_tokens)
    found, finished = collect(walk_gradients(tiny_checkpoint, samples))
    names = pruned_names(tiny_checkpoint)
    assert sorted(finished) == sorted(names)
    blocks = [name.rpartition(".self_attn")[0] or name.rpartition(".mlp")[0] for name in finished]
    order = [name.rpartition(".self_attn")[0] or name.rpartition(".mlp")[0] for name in names]
    assert list(dict.fromkeys(blocks)) == list(dict.fromkeys(order))[::-1]
    _, weights, runs = stock_runs(tiny_checkpoint, tiny_path, samples)
    for sample, (prompt, logits) in enumerate(runs):
        columns = slice(prompt.answer_start - 1, prompt.answer_end - 1)
        answer = torch.tensor(prompt.token_ids[prompt.answer_start : prompt.answer_end])
        loss = functional.cross_entropy(logits[columns], answer)
        expected = torch.autograd.grad(loss, list(weights.values()))
        for name, gradient in zip(weights, expected, strict=True):
            assert_near(found.pop((name, sample)), gradient, f"{name} of sample {sample}")
    assert not found


@pytest.mark.parametrize("batch_tokens", [64, 1024])
def test_block_gradients_are_those_of_the_length_of_a_blocks_output(
    tiny_checkpoint, tiny_path, samples, monkeypatch, batch_tokens
):
    monkeypatch.setattr(layer_gradients, "_BATCH_TOKENS", batch_tokens)
    unanswered = replace(samples, samples=tuple(replace(sample, answer="") for sample in samples))
    spec = tiny_checkpoint.spec
    found, finished = collect(block_gradients(tiny_checkpoint, unanswered))
    assert sorted(finished) == sorted(pruned_names(tiny_checkpoint))
    stock, weights, runs = stock_runs(tiny_checkpoint, tiny_path, unanswered)
    projector = "model.connector" if spec.family == "idefics3" else "model.multi_modal_projector"
    blocks = [
        *(f"{spec.tower.stack}.{block}" for block in range(spec.tower.feature_block + 1)),
        projector,
        *(f"{spec.decoder.stack}.{block}" for block in range(spec.decoder.depth)),
    ]
    behind = {}
    for name in blocks:
        stock.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, name=name: behind.update(
                {name: output[0] if isinstance(output, tuple) else output}
            )
        )
    for sample, _ in enumerate(runs):
        for block in blocks:
            own = {name: weight for name, weight in weights.items() if name.startswith(block)}
            length = behind[block].square().sum().sqrt()
            gradients = torch.autograd.grad(length, list(own.values()), retain_graph=True)
            for name, gradient in zip(own, gradients, strict=True):
                assert_near(found.pop((name, sample)), gradient, f"{name} of sample {sample}")
    assert not found


@pytest.mark.parametrize("walk", [walk_gradients, block_gradients])
def test_what_spills_to_disk_changes_nothing_and_leaves_nothing(
    tiny_checkpoint, samples, tmp_path, monkeypatch, walk
):
    held, _ = collect(walk(tiny_checkpoint, samples))
    monkeypatch.setattr(activations.ActivationStore.__init__, "__defaults__", (None, 0))
    spilled, _ = collect(walk(tiny_checkpoint, samples, spill_folder=tmp_path))
    assert held.keys() == spilled.keys()
    assert all(torch.equal(spilled[key], gradient) for key, gradient in held.items())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("walk", [walk_gradients, block_gradients])
def test_no_more_than_one_block_is_dense_at_a_time(tiny_checkpoint, samples, walk):
    modules = [
        module
        for module in tiny_checkpoint.model.modules()
        if isinstance(module, FormLinear | FormEmbedding)
    ]
    steps = walk(tiny_checkpoint, samples)
    for _ in steps:
        assert sum(module.cached is not None for module in modules) <= 7
    assert all(module.cached is None for module in modules)
    steps = walk(tiny_checkpoint, samples)
    next(steps)
    steps.close()
    assert all(module.cached is None for module in modules)


def test_a_layer_that_nothing_reads_is_an_error_that_names_it(tiny_checkpoint, samples):
    spec = tiny_checkpoint.spec
    layer = f"{spec.decoder.stack}.1.mlp.down_proj"
    down = tiny_checkpoint.layer(layer)
    down.form = replace(down.form, values=torch.zeros_like(down.form.values))
    for walk in (walk_gradients, block_gradients):
        with pytest.raises(CalibrationError, match=r"1\.mlp\.gate_proj: its gradient is zero on"):
            collect(walk(tiny_checkpoint, samples))


def test_a_gradient_that_is_not_finite_names_sample_and_layer(tiny_checkpoint, samples):
    spec = tiny_checkpoint.spec
    name = f"{spec.tower.stack}.0.self_attn.v_proj"
    layer = tiny_checkpoint.layer(name)
    layer.form = replace(layer.form, values=layer.form.values * float("nan"))
    with pytest.raises(CalibrationError, match="reference scene 0: the loss of its answer is not"):
        collect(walk_gradients(tiny_checkpoint, samples))
    with pytest.raises(CalibrationError, match=r"scene 0: its gradient at .*0\.self_attn.*finite"):
        collect(block_gradients(tiny_checkpoint, samples))


def test_a_sample_without_an_answer_is_an_error_before_any_work(tiny_checkpoint, samples):
    blank = Sample(
        image=samples.samples[0].image, question="How many?", answer=" ", where="data.jsonl:7"
    )
    mixed = CalibrationSet(name="x", samples=(*samples, blank))
    tiny_checkpoint.layer(tiny_checkpoint.spec.decoder.embedding).form = None  # nothing can run
    with pytest.raises(CalibrationError, match="data.jsonl:7: has no answer"):
        next(walk_gradients(tiny_checkpoint, mixed))


def test_visual_tokens_must_all_be_there(tiny_checkpoint, samples):
    class First(TokenReducer):
        def forward(self, inputs):
            indices = torch.arange(self.keep).expand(inputs.features.shape[0], -1)
            return inputs.features[:, : self.keep], indices

    reduced = replace(tiny_checkpoint, reducer=First(keep=4, positions="original"))
    early = replace(tiny_checkpoint, visual_schedule=VisualSchedule.ending(1))
    for walk in (walk_gradients, block_gradients):
        for other in (reduced, early):
            with pytest.raises(RecipeError, match="before visual tokens are dropped"):
                next(walk(other, samples))
