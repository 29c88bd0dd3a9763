"""The block-by-block backward pass gives the gradients of the whole graph, and fair weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from pocketvlm.calibration import CalibrationSet, Sample
from pocketvlm.calibration.data.prompts import batch_prompts, encode_samples
from pocketvlm.calibration.gradients.backward import answer_loss, walk_back
from pocketvlm.calibration.gradients.token_weights import FLOOR, gradient_weights
from pocketvlm.calibration.walk import activations
from pocketvlm.errors import CalibrationError
from pocketvlm.models.reducer import TokenReducer
from pocketvlm.prompt.messages import user_turn
from pocketvlm.reference_graph.forward import (
    VisualTokens,
    decode_logits,
    embed_prompts,
    encode_images,
)
from pocketvlm.weights.modules import FormEmbedding, FormLinear


class EveryOther(TokenReducer):
    """Keeps every other token, for tests."""

    def forward(self, inputs):
        indices = torch.arange(0, inputs.features.shape[1], 2)[: self.keep]
        return inputs.features[:, indices], indices.expand(inputs.features.shape[0], -1)


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet.from_reference(3, 6)


@pytest.fixture(params=["all", "original", "consecutive"])
def checkpoint(tiny_checkpoint, request):
    if request.param == "all":
        return tiny_checkpoint
    keep = tiny_checkpoint.spec.visual_tokens // 2
    return replace(tiny_checkpoint, reducer=EveryOther(keep=keep, positions=request.param))


def encode(checkpoint, samples):
    """Prompts, batches of at most two prompts, and visual tokens of all samples."""
    prompts = encode_samples(checkpoint.processor, samples)
    batches = batch_prompts(prompts, len(samples), 2 * max(len(p.token_ids) for p in prompts))
    with torch.no_grad():
        pixels = checkpoint.processor.pixels([sample.open_image() for sample in samples])
        return prompts, batches, encode_images(checkpoint, pixels)


def whole_graph(checkpoint, prompts, visual):
    """Gradients in float64 by autograd through the stock decoder, one sample at a time."""
    model, spec = checkpoint.model.double(), checkpoint.spec
    for module in model.modules():
        if isinstance(module, FormLinear | FormEmbedding):
            module.cached = module.form.dequantize().double()
    layers = {
        linear.name: model.get_submodule(linear.name)
        for linear in spec.linears()
        if linear.part == "decoder"
    }
    for layer in layers.values():
        layer.cached.requires_grad_()
    outputs, losses, found = {}, [], {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda _m, _i, output, name=name: outputs.update({name: output})
        )
    total = 0.0
    for index, prompt in enumerate(prompts):
        row = VisualTokens(embeds=visual.embeds[[index]].double(), indices=visual.indices[[index]])
        starts = [prompt.answer_start]
        inputs = embed_prompts(
            checkpoint, torch.tensor([prompt.token_ids]), row, answer_starts=starts
        )
        logits = decode_logits(checkpoint, inputs)[0]
        answer = prompt.token_ids[prompt.answer_start : prompt.answer_end]
        # From the end: what was removed from the image lies before the answer.
        behind = len(prompt.token_ids) - prompt.answer_start
        first = logits.shape[0] - behind - 1
        loss = functional.cross_entropy(logits[first : first + len(answer)], torch.tensor(answer))
        total = total + loss
        losses.append(float(loss.detach()))
        for name, gradient in zip(
            outputs,
            torch.autograd.grad(loss, list(outputs.values()), retain_graph=True),
            strict=True,
        ):
            found[name].append(gradient[0])
    weights = torch.autograd.grad(total, [layer.cached for layer in layers.values()])
    return losses, found, dict(zip(layers, weights, strict=True))


def assert_near(found, expected, message):
    scale = float(expected.abs().max())
    assert scale > 0, message
    assert float((found.double() - expected).abs().max()) < 1e-5 * scale, message


def hold_to_the_whole_graph(checkpoint, samples):
    """Gradients of a walk back, of outputs and weights, held to those of the whole graph."""
    prompts, batches, visual = encode(checkpoint, samples)
    outputs, weights = {}, {}
    with answer_loss(checkpoint, prompts, batches, visual) as loss:
        mean = loss.mean
        for step in walk_back(checkpoint, loss, weights=True):
            for name, gradient in step.outputs.items():
                for row, sample in enumerate(batches[step.batch].samples):
                    outputs[name, sample] = gradient[row]
            for name, gradient in step.weights.items():
                weights[name] = weights.get(name, 0) + gradient
    losses, expected, expected_weights = whole_graph(checkpoint, prompts, visual)
    assert mean == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    for (name, sample), gradient in outputs.items():
        assert_near(gradient, expected[name][sample], f"{name} of sample {sample}")
    for name, gradient in weights.items():
        assert_near(gradient, expected_weights[name], name)
    return outputs, weights, expected_weights


def test_gradients_are_those_of_the_whole_graph(checkpoint, samples):
    outputs, weights, expected = hold_to_the_whole_graph(checkpoint, samples)
    assert len(outputs) == 7 * checkpoint.spec.decoder.depth * len(samples)
    assert weights.keys() == expected.keys()


def test_what_spills_to_disk_changes_nothing_and_leaves_nothing(
    tiny_checkpoint, samples, tmp_path, monkeypatch
):
    prompts, batches, visual = encode(tiny_checkpoint, samples)
    held = gradient_weights(tiny_checkpoint, prompts, batches, visual)
    monkeypatch.setattr(activations.ActivationStore.__init__, "__defaults__", (None, 0))
    spilled = gradient_weights(tiny_checkpoint, prompts, batches, visual, tmp_path)
    for place, expected in held.by_place.items():
        assert all(map(torch.equal, spilled.by_place[place], expected))
    assert not list(tmp_path.iterdir())
    assert not any(
        module.cached is not None
        for module in tiny_checkpoint.model.modules()
        if isinstance(module, FormLinear)
    )


def test_weights_follow_the_gradient_and_have_mean_one(tiny_checkpoint, samples):
    prompts, batches, visual = encode(tiny_checkpoint, samples)
    importance = gradient_weights(tiny_checkpoint, prompts, batches, visual)
    _, expected, _ = whole_graph(tiny_checkpoint, prompts, visual)
    last = tiny_checkpoint.spec.decoder.depth - 1
    prefix = f"{tiny_checkpoint.spec.decoder.stack}.{last}"
    joined = {
        ("attention", "first"): ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("attention", "last"): ("self_attn.o_proj",),
        ("ffn", "first"): ("mlp.gate_proj", "mlp.up_proj"),
        ("ffn", "last"): ("mlp.down_proj",),
    }
    for (kind, position), names in joined.items():
        for number, batch in enumerate(batches):
            weights = importance.weights(last, kind, number, position)
            assert weights.dtype == torch.float32
            assert weights.mean(dim=-1).tolist() == pytest.approx([1.0] * len(batch.samples))
            assert float(weights.min()) >= FLOOR * (1 - 1e-6)
            for row, sample in enumerate(batch.samples):
                gradients = torch.cat(
                    [expected[f"{prefix}.{name}"][sample] for name in names], dim=-1
                )
                lengths = gradients.norm(dim=-1)
                shares = FLOOR + (1 - FLOOR) * lengths / lengths.mean()
                torch.testing.assert_close(weights[row].double(), shares, rtol=1e-4, atol=1e-5)


def test_keys_of_the_last_block_count_although_its_outputs_do_not(tiny_checkpoint, samples):
    prompts, batches, visual = encode(tiny_checkpoint, samples)
    importance = gradient_weights(tiny_checkpoint, prompts, batches, visual)
    last = tiny_checkpoint.spec.decoder.depth - 1
    flags = importance.is_visual[0]
    # Nobody reads what the last block makes of a visual token, but answers attend to its key.
    for kind in ("attention", "ffn"):
        outputs = importance.weights(last, kind, 0)
        assert outputs[flags].unique().tolist() == [pytest.approx(FLOOR)]
    assert float(importance.weights(last, "attention", 0, "first")[flags].min()) > 2 * FLOOR
    rows = importance.summary()
    assert len(rows) == 4 * tiny_checkpoint.spec.decoder.depth
    ends = [row for row in rows if row["block"] == last and row["linears"] == "last"]
    assert all(row["visual_weight"] == pytest.approx(FLOOR) for row in ends)
    assert all(row["text_weight"] > 1 for row in ends)
    assert {row["samples_without_gradient"] for row in rows} == {0}


def test_a_certain_answer_counts_as_much_as_a_doubtful_one(tiny_checkpoint, samples):
    prompts, batches, visual = encode(tiny_checkpoint, samples)
    whole = gradient_weights(tiny_checkpoint, prompts, batches, visual)
    # An answer of one token has another loss than one of many; its tokens weigh one on average.
    short = [replace(prompt, answer_end=prompt.answer_start + 1) for prompt in prompts]
    importance = gradient_weights(tiny_checkpoint, short, batches, visual)
    assert importance.loss != whole.loss
    assert importance.weights(0, "ffn", 0).sum() == pytest.approx(
        float(whole.weights(0, "ffn", 0).sum())
    )


def test_a_sample_without_any_gradient_weighs_its_tokens_alike(tiny_checkpoint, samples):
    prompts, batches, visual = encode(tiny_checkpoint, samples)
    head = tiny_checkpoint.layer(tiny_checkpoint.spec.decoder.head)
    head.form = replace(head.form, values=torch.zeros_like(head.form.values))
    importance = gradient_weights(tiny_checkpoint, prompts, batches, visual)
    assert {row["samples_without_gradient"] for row in importance.summary()} == {len(samples)}
    assert all(
        float(weights.min()) == float(weights.max()) == 1
        for batches in importance.by_place.values()
        for weights in batches
    )


def test_the_answer_is_found_behind_its_prompt(tiny_checkpoint, samples):
    processor = tiny_checkpoint.processor
    for sample, prompt in zip(samples, encode_samples(processor, samples), strict=True):
        answer = prompt.token_ids[prompt.answer_start : prompt.answer_end]
        assert processor.decode(answer) == sample.answer
        assert answer[-1] in processor.eos_token_ids
        question = processor.decode(prompt.token_ids[: prompt.answer_start])
        assert question.endswith("Assistant:")


def test_a_sample_without_an_answer_is_an_error_that_names_it(tiny_checkpoint, samples):
    blank = Sample(
        image=samples.samples[0].image, question="How many?", answer=" ", where="data.jsonl:7"
    )
    prompts, batches, visual = encode(tiny_checkpoint, CalibrationSet(name="x", samples=(blank,)))
    with pytest.raises(CalibrationError, match="data.jsonl:7: has no answer"):
        gradient_weights(tiny_checkpoint, prompts, batches, visual)
    wordy = replace(blank, turns=(user_turn("why? " * 500, 1),), answer="because")
    prompts = encode_samples(tiny_checkpoint.processor, CalibrationSet(name="x", samples=(wordy,)))
    with pytest.raises(CalibrationError, match="after token 512, where it was cut off"):
        gradient_weights(tiny_checkpoint, prompts, batches, visual)


def test_a_loss_that_is_not_finite_is_an_error(tiny_checkpoint, samples):
    prompts, batches, visual = encode(tiny_checkpoint, samples)
    broken = VisualTokens(embeds=visual.embeds * float("nan"), indices=visual.indices)
    with pytest.raises(CalibrationError, match="not finite"):
        gradient_weights(tiny_checkpoint, prompts, batches, broken)
