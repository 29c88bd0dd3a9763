"""ECoFLaP: scores against slow ones of the whole model, and what is made of them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
import torch

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.calibration.gradients.answer_losses import AnswerLosses
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.unstructured.allocation import Uniform, uniform_counts
from pocketvlm.compress.pruning.unstructured.ecoflap import Ecoflap
from pocketvlm.compress.pruning.unstructured.loss_scores import (
    first_order_scores,
    zeroth_order_score,
    zeroth_order_scores,
)
from pocketvlm.compress.pruning.unstructured.magnitude import Magnitude
from pocketvlm.compress.pruning.unstructured.patterns import Blocked, SemiStructured, Unstructured
from pocketvlm.compress.pruning.unstructured.pruner import Prune
from pocketvlm.compress.pruning.unstructured.rules import PruneRule
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError, RecipeError
from pocketvlm.reference_graph.forward import decode_logits, embed_prompts, encode_images
from pocketvlm.stages import PlanState
from pocketvlm.weights.dense import DenseWeight

FREE = Unstructured()


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet.from_reference(0, 4)


@pytest.fixture
def smol(tiny_paths):
    """One family is enough where nothing depends on it."""
    return Checkpoint.load(tiny_paths["smolvlm"])


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A scratch folder for each family: scores depend on neither ratio, group nor pattern."""
    return {family: tmp_path_factory.mktemp(family) for family in ("llava", "idefics3")}


def prunable(checkpoint):
    return [
        linear
        for linear in checkpoint.spec.linears()
        if linear.part in ("tower", "projector", "decoder")
    ]


def scores_of(budget):
    return budget.metrics["scores"]


def answer_losses(checkpoint, samples):
    """One sample at a time through the whole model; autograd may record it."""
    found = []
    for prompt, sample in zip(
        encode_samples(checkpoint.processor, samples), samples.samples, strict=True
    ):
        visual = encode_images(checkpoint, checkpoint.processor.pixels([sample.open_image()]))
        inputs = embed_prompts(checkpoint, torch.tensor([prompt.token_ids]), visual)
        logits = decode_logits(checkpoint, inputs)[0].double().log_softmax(dim=-1)
        answer = range(prompt.answer_start, prompt.answer_end)
        found.append(-sum(logits[at - 1, prompt.token_ids[at]] for at in answer) / len(answer))
    return torch.stack(found)


def test_zeroth_order_is_that_of_whole_forward_passes(tiny_path, samples):
    checkpoint, copy = Checkpoint.load(tiny_path), Checkpoint.load(tiny_path)
    few = samples.take(2)
    linears = prunable(checkpoint)
    chosen = linears[::5] + [linear for linear in linears if linear.part == "projector"]
    found = zeroth_order_scores(
        checkpoint, [linear.name for linear in chosen], few, RunContext(seed=3), noise=0.03, draws=2
    )
    for linear in chosen:
        name, total = linear.name, 0.0
        weight = copy.form(name)
        scale = float(weight.values.double().square().mean().sqrt())
        for draw in range(2):
            digest = hashlib.sha256(f"3 {name} {draw}".encode()).digest()
            noise = torch.randn(
                weight.shape,
                generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") // 2),
            )
            losses = []
            for sign in (1, -1):
                values = weight.values.double() + sign * 0.03 * scale * noise.double()
                copy.set_form(name, DenseWeight(values=values.float()))
                with torch.no_grad():
                    losses.append(answer_losses(copy, few))
            copy.set_form(name, weight)
            total += float((losses[0] - losses[1]).abs().sum()) / 0.06
        assert found[name] == pytest.approx(total / 4, rel=0.02, abs=1e-6), name
        assert found[name] > 1e-5


def test_first_order_is_that_of_autograd_through_the_whole_model(tiny_path, samples):
    checkpoint = Checkpoint.load(tiny_path)
    names = [linear.name for linear in prunable(checkpoint)]
    found = first_order_scores(checkpoint, names, samples, RunContext())
    layers = [checkpoint.layer(name) for name in names]
    for layer in layers:
        layer.cached = layer.form.dequantize().requires_grad_()
    totals = dict.fromkeys(names, 0.0)
    for loss in answer_losses(checkpoint, samples):
        gradients = torch.autograd.grad(loss, [layer.cached for layer in layers], retain_graph=True)
        for name, layer, gradient in zip(names, layers, gradients, strict=True):
            totals[name] += float(
                (layer.form.dequantize().double() * gradient.double()).abs().sum()
            )
    assert found.keys() == totals.keys()
    for name in names:
        assert found[name] == pytest.approx(totals[name] / len(samples), rel=1e-3), name


def test_a_score_is_the_mean_length_of_gradients_times_the_weights_scale():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 24, 40, generator=generator).double()
    gradients *= torch.tensor([1.0, 2.0, 5.0, 0.1, 3.0, 1.0])[:, None, None]
    weight = DenseWeight(values=torch.randn(24, 40, generator=generator))

    def losses_with(form):
        shift = form.values.double()
        # Whatever is even in the step cancels out.
        return (gradients * shift).sum(dim=(1, 2)) + 3 * (shift - weight.values).square().sum()

    found = zeroth_order_score(
        losses_with,
        weight,
        noise=0.01,
        generators=[torch.Generator().manual_seed(seed) for seed in range(800)],
    )
    scale = float(weight.values.double().square().mean().sqrt())
    expected = math.sqrt(2 / math.pi) * scale * float(gradients.flatten(1).norm(dim=1).mean())
    assert found == pytest.approx(expected, rel=0.06)
    zero = DenseWeight(values=torch.zeros(24, 40))
    assert zeroth_order_score(losses_with, zero, noise=0.01, generators=[generator]) == 0


def test_a_score_does_not_change_where_a_norm_takes_up_the_weights_scale(smol, samples):
    names = [f"{smol.spec.decoder.stack}.0.mlp.{name}" for name in ("gate_proj", "up_proj")]
    before = zeroth_order_scores(smol, names, samples, RunContext(), noise=0.01, draws=1)
    smol.model.get_submodule(f"{smol.spec.decoder.stack}.0.post_attention_layernorm").weight /= 4
    for name in names:
        smol.set_form(name, DenseWeight(values=smol.form(name).values * 4))
    after = zeroth_order_scores(smol, names, samples, RunContext(), noise=0.01, draws=1)
    assert after == pytest.approx(before, rel=1e-3)


def test_weights_are_left_as_they_were_bit_by_bit(tiny_checkpoint, samples):
    layers = prunable(tiny_checkpoint)
    forms = {layer.name: tiny_checkpoint.form(layer.name) for layer in layers}
    bits = {name: form.values.clone() for name, form in forms.items()}

    def check():
        for name, form in forms.items():
            assert tiny_checkpoint.form(name) is form
            assert torch.equal(form.values.view(torch.uint8), bits[name].view(torch.uint8))

    Ecoflap(samples=1).allocate(tiny_checkpoint, layers, 0.5, FREE, samples, RunContext())
    check()
    # A weight near the end of float32: with noise, what it gives is not finite.
    name = layers[-1].name
    huge = DenseWeight(values=torch.full_like(forms[name].values, 1e37, dtype=torch.float32))
    tiny_checkpoint.set_form(name, huge)
    with pytest.raises(CalibrationError, match="is not finite"):
        Ecoflap(samples=1).allocate(tiny_checkpoint, layers, 0.5, FREE, samples, RunContext())
    assert tiny_checkpoint.form(name) is huge
    tiny_checkpoint.set_form(name, forms[name])
    losses = AnswerLosses(tiny_checkpoint, samples.take(1))
    with pytest.raises(CalibrationError, match=f"with {name} in another form"):
        losses.with_form(name, DenseWeight(values=huge.values * 1e38))
    check()


def test_noise_belongs_to_the_seed_and_the_layer_alone(smol, samples):
    layers = prunable(smol)
    few = samples.take(1)

    def score(chosen, seed):
        names = [layer.name for layer in chosen]
        return zeroth_order_scores(smol, names, few, RunContext(seed=seed), noise=0.01, draws=1)

    whole = score(layers, 0)
    assert score(layers[::-3], 0) == {layer.name: whole[layer.name] for layer in layers[::-3]}
    other = score(layers, 1)
    assert all(other[name] != whole[name] for name in whole)


@pytest.mark.parametrize("pattern", [FREE, Blocked(rows=2, columns=8)], ids=lambda p: p.kind)
@pytest.mark.parametrize("group", ["block", "layer", "part"])
def test_the_budget_is_exact_and_no_group_beyond_its_bound(
    tiny_checkpoint, samples, scored, group, pattern
):
    layers, spec = prunable(tiny_checkpoint), tiny_checkpoint.spec
    stage = Ecoflap(group=group, samples=1)
    ctx = RunContext(scratch_dir=scored[spec.family])
    for ratio in (0.3, 0.6):
        budget = stage.allocate(tiny_checkpoint, layers, ratio, pattern, samples, ctx)
        assert budget.kept.keys() == {layer.name for layer in layers}
        assert sum(budget.kept.values()) == sum(uniform_counts(layers, ratio, pattern).values())
        expected = {
            "block": spec.tower.feature_block + 1 + 1 + spec.decoder.depth,
            "layer": len(layers),
            "part": 3,
        }[group]
        rows = {row["group"]: row for row in budget.rows}
        assert len(rows) == len(budget.rows) == expected
        assert sum(row["weights"] for row in budget.rows) == sum(
            layer.out_features * layer.in_features for layer in layers
        )
        assert all(0 <= row["sparsity"] <= ratio + 0.1 for row in budget.rows)
        assert max(row["sparsity"] for row in budget.rows) > ratio
        assert math.fsum(row["score"] for row in budget.rows) == pytest.approx(
            math.fsum(scores_of(budget).values())
        )
        for layer in layers:
            size = layer.out_features * layer.in_features
            kept = budget.kept[layer.name]
            assert kept % pattern.elements == 0
            assert 0 < kept <= size
            names = (layer.name, layer.part, f"{layer.part} {layer.block}")
            shared = next(rows[name]["sparsity"] for name in names if name in rows)
            # Within a group all layers lose the same share, to within rounding.
            assert abs(kept - (1 - shared) * size) <= pattern.elements * (1 + len(layers))


@pytest.mark.parametrize("order", ["zeroth", "first"])
def test_what_the_answers_do_not_depend_on_loses_most(tiny_checkpoint, samples, order):
    spec = tiny_checkpoint.spec
    block = f"{spec.decoder.stack}.{spec.decoder.depth - 1}"
    for last in (f"{block}.self_attn.o_proj", f"{block}.mlp.down_proj"):
        form = tiny_checkpoint.form(last)
        # Not zero: a layer without any gradient is refused by the first order.
        tiny_checkpoint.set_form(last, DenseWeight(values=form.dequantize() * 1e-5))
    layers = prunable(tiny_checkpoint)
    stage = Ecoflap(order=order, samples=4)
    budget = stage.allocate(tiny_checkpoint, layers, 0.5, FREE, samples, RunContext())
    by_group = {row["group"]: row["sparsity"] for row in budget.rows}
    idle = by_group.pop(f"decoder {spec.decoder.depth - 1}")
    assert idle == pytest.approx(0.6, abs=1e-3)
    assert max(by_group.values()) < idle
    density = {row["group"]: row["score"] / row["weights"] for row in budget.rows}
    ordered = sorted(by_group, key=density.__getitem__)
    assert [by_group[name] for name in ordered] == sorted(by_group.values(), reverse=True)


def test_a_block_that_does_nothing_is_named(smol, samples):
    spec = smol.spec
    block = f"{spec.decoder.stack}.{spec.decoder.depth - 1}"
    for last in (f"{block}.self_attn.o_proj", f"{block}.mlp.down_proj"):
        smol.set_form(last, DenseWeight(values=torch.zeros(smol.form(last).shape)))
    budget = Ecoflap(samples=1).allocate(smol, prunable(smol), 0.5, FREE, samples, RunContext())
    name = f"decoder {spec.decoder.depth - 1}"
    assert any(f"does not depend on {name}, which lose at most 0.6" in n for n in budget.notes)


def test_a_killed_run_goes_on_behind_the_last_layer(smol, samples, tmp_path):
    layers, few = prunable(smol), samples.take(1)
    stage = Ecoflap(draws=2)
    seen = []
    whole = stage.allocate(smol, layers, 0.5, FREE, few, RunContext(on_progress=seen.append))
    forwards = 2 * 2 * len(layers)
    assert [step.done for step in seen] == list(range(1, forwards + 1))
    assert {step.total for step in seen} == {forwards}

    def stop(progress):
        if progress.done == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.allocate(
            smol, layers, 0.5, FREE, few, RunContext(scratch_dir=tmp_path, on_progress=stop)
        )
    again = []
    ctx = RunContext(scratch_dir=tmp_path, on_progress=again.append)
    assert stage.allocate(smol, layers, 0.5, FREE, few, ctx) == whole
    assert [step.done for step in again] == list(range(9, forwards + 1))
    again.clear()
    assert stage.allocate(smol, layers, 0.5, FREE, few, ctx) == whole
    assert not again


def test_the_cost_is_known_beforehand(smol, samples):
    layers = prunable(smol)
    count = len(layers)
    cost = Ecoflap(draws=3).cost(smol.spec, layers)
    assert 1 + 6 * count * 0.3 < cost < 1 + 6 * count * 0.8
    assert Ecoflap(draws=3).cost(smol.spec, layers[:1]) == 7  # the first layer takes all of it
    (note,) = Ecoflap(draws=3, samples=5).plan_notes(smol.spec, layers)
    assert f"{6 * count} forward passes of 5 samples" in note
    assert f"as much as {cost:.0f} whole ones" in note
    (told,) = (
        Prune(score=Magnitude(), allocation=Ecoflap(draws=3, samples=5))
        .plan(PlanState.of(smol.spec))
        .notes
    )
    assert told == note
    (note,) = Ecoflap(order="first", samples=5).plan_notes(smol.spec, layers)
    assert "one forward and one backward pass of 5 samples" in note


def test_a_stage_shares_out_what_rules_leave(smol, samples):
    fixed = PruneRule(part="tower", ratio=0.25)
    stage = Prune(
        score=Magnitude(),
        ratio=0.6,
        rules=(fixed, PruneRule(part="decoder")),
        allocation=Ecoflap(samples=1, max_excess=0.2),
    )
    done = stage.apply(smol, samples, RunContext())
    record = done.history[-1]
    rows = {row["name"]: row for row in record.layers}
    free = [linear for linear in prunable(smol) if linear.part == "decoder"]
    assert sum(rows[linear.name]["kept"] for linear in free) == sum(
        uniform_counts(free, 0.6, FREE).values()
    )
    for linear in prunable(smol):
        if linear.part == "tower":
            assert rows[linear.name]["sparsity"] == pytest.approx(0.25, abs=1e-3)
    assert {row["group"].split()[0] for row in record.metrics["groups"]} == {"decoder"}
    assert record.parameters["allocation"]["kind"] == "ecoflap"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "second"}, "order 'second' is unknown; allowed are zeroth, first"),
        ({"group": "head"}, "group 'head' is unknown; allowed are block, layer, part"),
        ({"max_excess": 0.0}, "max_excess must lie between 0 and 1, not 0.0"),
        ({"noise": 0.0}, "noise must lie between 0 and 1"),
        ({"noise": math.nan}, "noise must lie between 0 and 1"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"order": "first", "draws": 2}, "noise and draws are options of order zeroth"),
        ({"samples": 0}, "samples must be at least 1"),
    ],
)
def test_what_a_recipe_may_not_say(change, message):
    with pytest.raises(ValueError, match=message):
        Ecoflap(**change)


def test_what_cannot_be_shared_out_is_refused(smol, samples):
    layers = prunable(smol)

    def allocate(stage, ratio, pattern, calibration=samples):
        stage.allocate(smol, layers, ratio, pattern, calibration, RunContext())

    with pytest.raises(RecipeError, match="2:4 removes the same share of every layer"):
        allocate(Ecoflap(), 0.5, SemiStructured())
    with pytest.raises(RecipeError, match="on top of ratio 0.95 .* allowed is less than 0.05"):
        allocate(Ecoflap(), 0.95, FREE)
    with pytest.raises(ValueError, match="nothing to share out; allowed is kind uniform"):
        Prune(score=Magnitude(), pattern=SemiStructured(), allocation=Ecoflap())
    with pytest.raises(RecipeError, match=r"give a larger max_excess or wider groups"):
        narrow = Ecoflap(samples=1, group="layer", max_excess=0.001)
        allocate(narrow, 0.6, Blocked(rows=16, columns=16))
    mute = replace(samples, samples=tuple(replace(s, answer="") for s in samples.samples))
    for order in ("zeroth", "first"):
        with pytest.raises(CalibrationError, match="has no answer"):
            allocate(Ecoflap(order=order), 0.5, FREE, mute)


def test_uniform_is_what_every_allocation_adds_up_to(smol, samples):
    layers = prunable(smol)
    alike = Uniform().allocate(smol, layers, 0.7, FREE, samples, RunContext())
    budget = Ecoflap(samples=1).allocate(smol, layers, 0.7, FREE, samples, RunContext())
    assert sum(alike.kept.values()) == sum(budget.kept.values())
    assert alike.kept != budget.kept
