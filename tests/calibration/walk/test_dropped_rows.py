"""Every walk drops the visual rows that the forward pass does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pocketvlm.bundle import VisualDrop, VisualSchedule
from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.calibration.gradients.token_weights import FLOOR, gradient_weights
from pocketvlm.calibration.walk.partial_forward import PartialForward
from pocketvlm.calibration.walk.steps import FinishedSublayer
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.reference_graph.forward import decode_logits, embed_prompts, encode_images
from tests.calibration.gradients.test_token_weights import encode, hold_to_the_whole_graph

LATE = 2


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet.from_reference(0, 5)


@pytest.fixture
def checkpoint(deep_checkpoint):
    return replace(deep_checkpoint, visual_schedule=VisualSchedule.ending(LATE))


@pytest.fixture(params=["layer_before", "layer_after"])
def ranking(request, deep_checkpoint):
    """Two drops by rank, of which the second leaves a quarter."""
    drops = (VisualDrop(layers=1, keep=9), VisualDrop(layers=3, keep=4))
    schedule = VisualSchedule(
        drops=drops, tokens=16, ranked_in=request.param, positions="consecutive"
    )
    return replace(deep_checkpoint, visual_schedule=schedule)


@pytest.fixture(params=["ended", "ranked"])
def dropping(request, checkpoint, ranking):
    """Either."""
    return checkpoint if request.param == "ended" else ranking


def forward_passes(checkpoint, samples):
    """Every sample's spliced prompt and logits, one by one."""
    for sample, prompt in zip(samples, encode_samples(checkpoint.processor, samples), strict=True):
        visual = encode_images(checkpoint, checkpoint.processor.pixels([sample.open_image()]))
        starts = [prompt.answer_start]
        inputs = embed_prompts(
            checkpoint, torch.tensor([prompt.token_ids]), visual, answer_starts=starts
        )
        yield prompt, inputs, lambda inputs=inputs: decode_logits(checkpoint, inputs)[0]


@torch.no_grad()
def moments_by_hooks(checkpoint, samples):
    """X^T X of every decoder linear; visual rows weigh 0.5 where they run, 0 where nobody reads."""
    sums, totals, weights = {}, {}, {}

    def watch(name):
        def hook(_module, inputs):
            X = inputs[0][0].double()
            if ".o_proj" in name and name.split(".layers.")[1].startswith(f"{LATE - 1}."):
                w = weights["text"]
            elif len(X) == len(weights["text"]):
                w = weights["both"]
            else:
                assert len(X) == int(weights["text"].sum()), name
                w = torch.ones(len(X), dtype=torch.float64)
            sums[name] = sums.get(name, 0) + (X * w[:, None]).T @ X
            totals[name] = totals.get(name, 0) + float(w.sum())

        return hook

    for linear in checkpoint.spec.linears():
        if linear.part == "decoder":
            layer = checkpoint.model.get_submodule(linear.name)
            layer.register_forward_pre_hook(watch(linear.name))
    for _, inputs, run in forward_passes(checkpoint, samples):
        flags = inputs.is_visual[0]
        weights["text"] = (~flags).double()
        weights["both"] = torch.where(flags, 0.5, 1.0).double()
        run()
    return {name: total / totals[name] for name, total in sums.items()}


@pytest.mark.parametrize("carry_float", [False, True])
def test_moments_are_those_of_the_rows_that_run(checkpoint, samples, carry_float):
    walk = BlockWalk(
        checkpoint=checkpoint,
        samples=samples,
        weighting=0.5,
        held_out=0.0,
        carry_float=carry_float,
    )
    found, ends = {}, {}
    for step in walk:
        if isinstance(step, FinishedSublayer):
            ends[step.sublayer.last] = [
                (tuple(states.shape[:2]), step.weights_of(index))
                for index, states in enumerate(step.targets)
            ]
            continue
        for name in step.names:
            if step.moments is not None and name.startswith(checkpoint.spec.decoder.stack):
                (found[name],) = step.moments(None).calibration.blocks()
    expected = moments_by_hooks(checkpoint, samples)
    assert found.keys() == expected.keys()
    for name, moments in expected.items():
        torch.testing.assert_close(found[name].double(), moments, rtol=2e-4, atol=1e-5, msg=name)
    if carry_float:
        prefix = f"{checkpoint.spec.decoder.stack}.{LATE - 1}"
        assert all(float(w.min()) == 0 for _, w in ends[f"{prefix}.self_attn.o_proj"])
        for (whole, _), (text, weights) in zip(
            ends[f"{prefix}.self_attn.o_proj"], ends[f"{prefix}.mlp.down_proj"], strict=True
        ):
            assert text[1] == whole[1] - checkpoint.spec.visual_tokens
            assert bool((weights == 1).all())


@torch.no_grad()
@pytest.mark.parametrize("weighting", ["uniform", "gradient"])
def test_moments_are_those_of_the_rows_that_are_kept(ranking, samples, weighting):
    """The feed-forward networks' inputs; what is ranked by a layer is seen by its hooks twice."""
    walk = BlockWalk(
        checkpoint=ranking, samples=samples, weighting=weighting, held_out=0.0, carry_float=True
    )
    found, of_last = {}, {}
    for step in walk:
        if isinstance(step, FinishedSublayer):
            of_last[step.sublayer.last] = [step.weights_of(index) for index in range(2)]
        elif step.moments is not None and ".mlp." in step.names[0]:
            (found[step.names[0]],) = step.moments(None).calibration.blocks()
    stack = f"{ranking.spec.decoder.stack}."
    found = {name: moments for name, moments in found.items() if name.startswith(stack)}
    assert len(found) == 2 * ranking.spec.decoder.depth
    if ranking.visual_schedule.ranked_in == "layer_before":
        kept = [int((w > 0).sum(1).max()) for w in of_last[f"{stack}0.self_attn.o_proj"]]
        after = [len(w[0]) for w in of_last[f"{stack}0.mlp.down_proj"] if w is not None]
        assert not after or kept == after
    if weighting == "gradient":
        return
    sums, rows = {}, {}

    def watch(name):
        def hook(_module, inputs):
            X = inputs[0][0].double()
            sums[name] = sums.get(name, 0) + X.T @ X
            rows[name] = rows.get(name, 0) + len(X)

        return hook

    for name in found:
        ranking.model.get_submodule(name).register_forward_pre_hook(watch(name))
    for _, _, run in forward_passes(ranking, samples):
        run()
    for name, moments in found.items():
        expected = sums[name] / rows[name]
        torch.testing.assert_close(moments.double(), expected, rtol=2e-4, atol=1e-5, msg=name)


def test_gradients_are_those_of_the_whole_graph(dropping, samples):
    outputs, weights, _ = hold_to_the_whole_graph(dropping, samples)
    assert outputs
    assert weights


def test_gradient_weights_ask_for_nothing_where_visual_rows_have_ended(checkpoint, samples):
    prompts, batches, visual = encode(checkpoint, samples)
    importance = gradient_weights(checkpoint, prompts, batches, visual)
    flags = importance.is_visual[0]
    # Keys of the last layer that sees the picture are read; what its output would be is not.
    assert float(importance.weights(LATE - 1, "attention", 0, "first")[flags].min()) > 2 * FLOOR
    rows = {(row["block"], row["half"], row["linears"]): row for row in importance.summary()}
    assert rows[LATE - 1, "ffn", "first"]["visual_weight"] is None
    assert rows[LATE - 1, "attention", "first"]["visual_weight"] > 2 * FLOOR
    walk = BlockWalk(checkpoint=checkpoint, samples=samples, weighting="gradient", held_out=0.0)
    counted = [step.moments(None).calibration.tokens for step in walk if step.moments is not None]
    assert min(counted) > 0


@torch.no_grad()
def test_logits_behind_a_changed_layer_are_those_of_the_forward_pass(dropping, samples):
    checkpoint = dropping
    runner = PartialForward(checkpoint, samples)
    decoder = checkpoint.spec.decoder
    for block, role in (
        (0, "self_attn.q_proj"),
        (LATE - 1, "self_attn.o_proj"),
        (3, "mlp.up_proj"),
    ):
        name = f"{decoder.stack}.{block}.{role}"
        before = checkpoint.form(name)
        other = replace(before, values=before.values * 1.5)
        found = runner.logits_with(name, other)
        checkpoint.set_form(name, other)
        for index, (prompt, inputs, run) in enumerate(forward_passes(checkpoint, samples)):
            expected = run()[prompt.predicting(inputs.embeds.shape[1])]
            torch.testing.assert_close(found[index], expected, rtol=1e-4, atol=1e-5)
        checkpoint.set_form(name, before)
