"""The walk sees exactly what the model's own forward pass computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pocketvlm.calibration import CalibrationSet, Sample
from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.calibration.walk.steps import FinishedSublayer
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.errors import CalibrationError
from pocketvlm.models.reducer import TokenReducer
from pocketvlm.prompt.messages import Turn, user_turn
from pocketvlm.reference_graph.forward import decode_logits, embed_prompts, encode_images
from pocketvlm.weights.dense import DenseWeight


class EveryOther(TokenReducer):
    """Keeps every other token, for tests; it wants the first block's rows as well."""

    def __init__(self, *, keep, positions):
        super().__init__(keep=keep, positions=positions, earlier_blocks=(0,))

    def forward(self, inputs):
        assert [block.queries.shape for block in inputs.earlier] == [inputs.queries.shape]
        count = inputs.features.shape[1]
        indices = torch.arange(0, count, 2)[: self.keep]
        assert inputs.queries.shape == inputs.keys.shape
        return inputs.features[:, indices], indices.expand(inputs.features.shape[0], -1)


def with_reducer(checkpoint, reducer):
    return replace(checkpoint, reducer=reducer)


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet.from_reference(0, 7)


def direct_moments(checkpoint, samples, weights=None):
    """X^T X of every linear by hooks on the forward pass, one sample at a time."""
    spec, sums, totals = checkpoint.spec, {}, {}
    text = {}

    def watch(name):
        def hook(_module, inputs):
            X = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            w = torch.ones(X.shape[0], dtype=torch.float64)
            if name in text:
                w = text[name].reshape(-1).double()
            sums[name] = sums.get(name, 0) + (X * w[:, None]).T @ X
            totals[name] = totals.get(name, 0) + float(w.sum())

        return hook

    names = {linear.name for linear in spec.linears()}
    if spec.decoder.tied_head:
        names = names - {spec.decoder.embedding} | {spec.decoder.head}
    handles = [
        checkpoint.model.get_submodule(name).register_forward_pre_hook(watch(name))
        for name in names
        if name != spec.decoder.embedding
    ]
    with torch.no_grad():
        for sample, prompt in zip(
            samples, encode_samples(checkpoint.processor, samples), strict=True
        ):
            visual = encode_images(checkpoint, checkpoint.processor.pixels([sample.open_image()]))
            inputs = embed_prompts(checkpoint, torch.tensor([prompt.token_ids]), visual)
            for linear in spec.linears():
                if linear.part == "decoder" and weights is not None:
                    text[linear.name] = torch.where(inputs.is_visual, weights, 1.0)
            text[spec.decoder.head] = ~inputs.is_visual
            decode_logits(checkpoint, inputs)
    for handle in handles:
        handle.remove()
    if spec.decoder.tied_head:
        sums[spec.decoder.embedding] = sums.pop(spec.decoder.head)
        totals[spec.decoder.embedding] = totals.pop(spec.decoder.head)
    return {name: total / totals[name] for name, total in sums.items()}


@pytest.mark.parametrize("reduction", [None, "original", "consecutive"])
def test_every_second_moment_is_that_of_the_forward_pass(tiny_checkpoint, samples, reduction):
    checkpoint = tiny_checkpoint
    if reduction is not None:
        keep = checkpoint.spec.visual_tokens // 2
        reducer = EveryOther(keep=keep, positions=reduction)
        checkpoint = with_reducer(checkpoint, reducer)
    expected = direct_moments(checkpoint, samples, weights=0.5)
    seen = []
    walk = BlockWalk(checkpoint=checkpoint, samples=samples, weighting=0.5, held_out=0.0)
    for step in walk:
        for name in step.names:
            seen.append(name)
            if step.moments is None:
                assert name == checkpoint.spec.decoder.embedding
                continue
            (found,) = step.moments(None).calibration.blocks()
            torch.testing.assert_close(
                found.double(), expected[name], rtol=2e-4, atol=1e-5, msg=name
            )
    order = [linear.name for linear in checkpoint.spec.linears()]
    if checkpoint.spec.decoder.tied_head:
        # The one weight that is used twice comes where its inputs are known.
        order.append(order.pop(order.index(checkpoint.spec.decoder.embedding)))
    assert seen == order


def test_reduction_shortens_the_sequence_that_is_calibrated(tiny_checkpoint, samples):
    spec = tiny_checkpoint.spec
    walk = BlockWalk(checkpoint=tiny_checkpoint, samples=samples)
    keep = spec.visual_tokens // 2
    other = BlockWalk(
        checkpoint=with_reducer(tiny_checkpoint, EveryOther(keep=keep, positions="original")),
        samples=samples,
    )
    assert walk.counts.visual == spec.visual_tokens * len(samples)
    assert other.counts.visual == keep * len(samples)
    assert other.counts.text == walk.counts.text

    def decoder_tokens(walk):
        for step in walk:
            if step.names[0].startswith(spec.decoder.stack):
                moments = step.moments(None)
                return moments.calibration.tokens + moments.held_out.tokens
        raise AssertionError

    assert decoder_tokens(walk) == walk.counts.visual + walk.counts.text
    assert decoder_tokens(other) == other.counts.visual + other.counts.text


def test_a_step_sees_what_the_layers_before_it_produce_now(tiny_checkpoint, samples):
    """Replacing a weight changes the inputs after it and not those before it."""

    def moments(change):
        found = {}
        for step in BlockWalk(checkpoint=tiny_checkpoint, samples=samples):
            if step.moments is not None:
                found[step.names[0]] = step.moments(None).calibration.blocks()[0].clone()
            if change and step.names[0].endswith("0.mlp.fc1"):
                layer = tiny_checkpoint.layer(step.names[0])
                layer.form = DenseWeight(values=layer.form.dequantize() * 1.5)
        return found

    before, after = moments(change=False), moments(change=True)
    names = list(before)
    turn = next(i for i, name in enumerate(names) if name.endswith("0.mlp.fc1"))
    for index, name in enumerate(names):
        assert torch.equal(before[name], after[name]) == (index <= turn), name


def test_held_out_samples_enter_no_hessian(tiny_checkpoint, samples):
    walk = BlockWalk(checkpoint=tiny_checkpoint, samples=samples, held_out=0.3)
    assert walk.first_held_out == 4
    fitted = BlockWalk(checkpoint=tiny_checkpoint, samples=samples.take(4), held_out=0.0)
    for ours, theirs in zip(walk, fitted, strict=True):
        if ours.moments is None:
            continue
        mine, other = ours.moments(None), theirs.moments(None)
        torch.testing.assert_close(
            mine.calibration.blocks()[0], other.calibration.blocks()[0], rtol=1e-4, atol=1e-6
        )
        assert other.held_out is None
        assert mine.held_out.tokens > 0


def test_a_single_sample_cannot_be_held_out(tiny_checkpoint, samples):
    assert BlockWalk(checkpoint=tiny_checkpoint, samples=samples.take(1)).first_held_out == 1


def test_the_tower_may_be_known_after_fewer_images(tiny_checkpoint, samples):
    spec = tiny_checkpoint.spec
    per_image = spec.tower.tokens
    walk = BlockWalk(checkpoint=tiny_checkpoint, samples=samples, tower_tokens=2 * per_image)
    assert walk.tower_samples == 2
    tokens = {
        step.names[0]: step.moments(None).calibration.tokens
        for step in walk
        if step.moments is not None
    }
    first = next(iter(tokens))
    assert tokens[first] == 2 * per_image
    assert tokens[spec.projector.linears[0]] == spec.visual_tokens * walk.first_held_out


def test_no_layer_keeps_a_cached_weight(tiny_checkpoint, samples):
    for step in BlockWalk(checkpoint=tiny_checkpoint, samples=samples.take(2)):
        if step.moments is not None:
            step.moments(None)
    assert all(getattr(m, "cached", None) is None for m in tiny_checkpoint.model.modules())
    assert not any(m._forward_pre_hooks for m in tiny_checkpoint.model.modules())


def test_samples_that_cannot_be_calibrated_on_fail_first(tiny_checkpoint):
    def walk(sample):
        samples = CalibrationSet(name="bad", samples=(sample,))
        next(iter(BlockWalk(checkpoint=tiny_checkpoint, samples=samples)))

    with pytest.raises(CalibrationError, match="data.jsonl:4: has no image"):
        walk(Sample(image=None, question="?", answer="!", where="data.jsonl:4"))
    (good,) = CalibrationSet.synthetic(1)
    with pytest.raises(CalibrationError, match="data.jsonl:5: has 2 images; calibration takes"):
        walk(Sample(images=good.images * 2, question="?", answer="!", where="data.jsonl:5"))


def test_typed_control_words_are_text_in_calibration_too(tiny_checkpoint):
    (good,) = CalibrationSet.synthetic(1)
    typed = Sample(image=good.image, question="is <image> a tag?", answer="<image>, no <|im_end|>")
    spec = tiny_checkpoint.spec
    samples = CalibrationSet(name="typed", samples=(typed,))
    (prompt,) = encode_samples(tiny_checkpoint.processor, samples)
    assert prompt.token_ids.count(spec.image_token_id) == spec.visual_tokens
    answer = prompt.token_ids[prompt.answer_start : prompt.answer_end]
    assert tiny_checkpoint.processor.decode(answer) == typed.answer


def test_long_texts_are_cut_and_said_to_be(tiny_checkpoint):
    (good,) = CalibrationSet.synthetic(1)
    long = Sample(image=good.image, question="word " * 3000, answer="!")
    samples = CalibrationSet(name="long", samples=(long,))
    (prompt,) = encode_samples(tiny_checkpoint.processor, samples)
    assert prompt.is_truncated
    assert len(prompt.token_ids) == tiny_checkpoint.spec.decoder.max_positions
    turns = (Turn(role="system", parts=("word " * 3000,)), user_turn("?"))
    late = Sample(image=good.image, turns=turns, answer="!")
    with pytest.raises(CalibrationError, match="beyond the"):
        encode_samples(tiny_checkpoint.processor, CalibrationSet(name="late", samples=(late,)))


def test_the_float_path_runs_along(tiny_checkpoint):
    """Drift and targets against forward passes of the float model, with a half that was spoilt."""
    samples = CalibrationSet.from_reference(0, 4)
    whole = BlockWalk(checkpoint=tiny_checkpoint, samples=samples, held_out=0.25)
    clean: dict[str, torch.Tensor] = {}
    for step in whole:
        if step.moments is None:
            continue
        clean[step.names[0]] = step.moments(None).calibration.blocks()[0].clone()
    walk = BlockWalk(checkpoint=tiny_checkpoint, samples=samples, held_out=0.25, carry_float=True)
    sublayers = 0
    spoilt = False
    for step in walk:
        if isinstance(step, FinishedSublayer):
            sublayers += 1
            assert len(step.targets) == len(step.inputs)
            continue
        if step.moments is None:
            continue
        moments = step.moments(None)
        assert moments.drift is not None
        # E[x x^T] + C + C^T + E[d d^T] is the float model's own second moment.
        now = moments.calibration.blocks()[0]
        cross, own = moments.drift.cross.blocks()[0], moments.drift.own.blocks()[0]
        if not spoilt:
            assert float(own.abs().max()) == 0
        ideal = now + cross + cross.T + own
        expected = clean[step.names[0]]
        assert torch.allclose(ideal, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        for name in step.names:
            dense = tiny_checkpoint.form(name).dequantize()
            tiny_checkpoint.set_form(name, DenseWeight(values=dense * 0.8))
            spoilt = True
    spec = tiny_checkpoint.spec
    assert sublayers == 2 * (spec.tower.feature_block + 1 + spec.decoder.depth)


def test_gradient_weights_enter_the_decoder_alone(tiny_checkpoint):
    samples = CalibrationSet.from_reference(0, 4)
    moments = []
    for weighting in ("uniform", "gradient"):
        walk = BlockWalk(checkpoint=tiny_checkpoint, samples=samples, weighting=weighting)
        moments.append(
            {
                step.names[0]: step.moments(None).calibration.blocks()[0].clone()
                for step in walk
                if step.moments is not None
            }
        )
    spec = tiny_checkpoint.spec
    parts = {linear.name: linear.part for linear in spec.linears()}
    changed = {
        parts[name] for name in moments[0] if not torch.equal(moments[0][name], moments[1][name])
    }
    assert changed == {"decoder"}
