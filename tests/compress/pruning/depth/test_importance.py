"""What a block is worth: by definition, by brute force, and beside a block that does nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.calibration import CalibrationSet, Sample
from pocketvlm.calibration.data.modality import TokenCounts
from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.scratch import keep_document
from pocketvlm.compress.pruning.depth.block_influence import (
    BlockInfluence,
    block_influences,
    cosines,
)
from pocketvlm.compress.pruning.depth.block_path import BlockPath
from pocketvlm.compress.pruning.depth.blocks import Block, remove_blocks
from pocketvlm.compress.pruning.depth.greedy_blocks import (
    Greedy,
    count_trials,
    losses_without,
    remove_greedily,
)
from pocketvlm.compress.pruning.depth.stage import PruneDepth
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError
from pocketvlm.reference import reference_model_path
from tests.compress.pruning.tall import answer_losses, silence, write_tall
from tests.compress.quantization.functions import logits_of
from tests.stock import stock_of


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("tall")
    return {family: write_tall(family, root / family) for family in ("llava", "smolvlm")}


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet.from_reference(3, 4)


@pytest.fixture(params=("llava", "smolvlm"))
def checkpoint(request, paths):
    return Checkpoint.load(paths[request.param])


def path_of(checkpoint, samples):
    return BlockPath(checkpoint, samples, encode_samples(checkpoint.processor, samples))


def ignore(_count):
    """For those who do not watch progress."""


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_cosines_are_those_of_numpy_and_know_no_lengths(seed, first, second):
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(2, 3, 7)).astype(np.float32)
    expected = [
        np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(x, y, strict=True)
    ]
    found = cosines(torch.from_numpy(x) * first, torch.from_numpy(y) * second)
    assert found.dtype == torch.float64
    assert np.allclose(found.numpy(), expected, atol=1e-6)


def test_cosines_of_states_without_direction():
    zero, one = torch.zeros(1, 2), torch.ones(1, 2)
    assert cosines(zero, zero).tolist() == [1.0]
    assert cosines(zero, one).tolist() == [0.0]
    assert not bool(torch.isfinite(cosines(one, one * float("nan"))).any())


def reference_influences(checkpoint, samples, weight_of_visual):
    """BI by hooks on the stock model's forward pass, one sample and one token at a time."""
    spec, model = checkpoint.spec, stock_of(checkpoint)
    names = {block: block.name(spec) for block in path_of(checkpoint, samples).blocks}
    sums = {block: [0.0, 0.0] for block in names}
    flags = []

    def watch(block):
        def hook(_module, inputs, output):
            leaving = output[0] if isinstance(output, tuple) else output
            before, after = inputs[0][0].double().numpy(), leaving[0].double().numpy()
            for token, (x, y) in enumerate(zip(before, after, strict=True)):
                is_visual = block.stack == "decoder" and bool(flags[-1][token])
                weight = weight_of_visual if is_visual else 1.0
                sums[block][0] += weight * (x @ y) / (np.linalg.norm(x) * np.linalg.norm(y))
                sums[block][1] += weight

        return hook

    handles = [model.get_submodule(n).register_forward_hook(watch(b)) for b, n in names.items()]
    with torch.no_grad():
        for sample, prompt in zip(
            samples, encode_samples(checkpoint.processor, samples), strict=True
        ):
            pixels = checkpoint.processor.pixels([sample.open_image()])
            ids = torch.tensor([prompt.token_ids])
            flags.append(ids[0] == spec.image_token_id)
            pictures = pixels if spec.family == "llava" else pixels[:, None]
            model(input_ids=ids, pixel_values=pictures)
    for handle in handles:
        handle.remove()
    return {block: 1 - total / count for block, (total, count) in sums.items()}


@pytest.mark.parametrize("weighting", ["uniform", "balanced", 0.25])
def test_influence_is_its_definition_in_float64(checkpoint, samples, weighting):
    walk = BlockWalk(checkpoint=checkpoint, samples=samples)
    ratio = walk.counts.text / walk.counts.visual
    weight = {"uniform": 1.0, "balanced": ratio}.get(weighting, weighting)
    found = block_influences(
        path_of(checkpoint, samples),
        range(len(samples)),
        removed=(),
        weighting=weighting,
        counts=walk.counts,
        on_samples=ignore,
    )
    expected = reference_influences(checkpoint, samples, weight)
    assert found.keys() == expected.keys()
    for block, value in expected.items():
        assert found[block] == pytest.approx(value, abs=1e-6)


def test_influence_of_the_rest_is_that_of_the_model_without_the_removed(checkpoint, samples):
    gone = (Block(stack="tower", index=1), Block(stack="decoder", index=2))
    arguments = {"weighting": "uniform", "counts": TokenCounts(visual=1, text=1)}
    rows = range(len(samples))
    found = block_influences(
        path_of(checkpoint, samples), rows, removed=gone, on_samples=ignore, **arguments
    )
    rebuilt = remove_blocks(checkpoint, gone)
    expected = block_influences(
        path_of(rebuilt, samples), rows, removed=(), on_samples=ignore, **arguments
    )
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-9)


def test_losses_are_those_of_whole_passes(checkpoint, samples):
    path = path_of(checkpoint, samples)
    expected = answer_losses(checkpoint, samples)
    found = path.mean_loss(range(len(samples)))
    assert found == pytest.approx(np.mean(expected), rel=1e-5)
    # Samples keep their number when only some of them run.
    expected = np.mean(expected[2:])
    assert path.mean_loss(range(2, len(samples))) == pytest.approx(expected, rel=1e-5)


def test_a_trial_is_a_whole_pass_of_the_rebuilt_model(checkpoint, samples):
    path = path_of(checkpoint, samples)
    gone = [Block(stack="decoder", index=0)]
    candidates = [Block(stack="tower", index=2), *path.blocks[-2:]]
    found = losses_without(path, range(len(samples)), gone, candidates, ignore)
    assert list(found) == candidates
    for block, loss in found.items():
        rebuilt = remove_blocks(checkpoint, [*gone, block])
        assert loss == pytest.approx(np.mean(answer_losses(rebuilt, samples)), rel=1e-5)
        assert loss == pytest.approx(path.mean_loss(range(len(samples)), [*gone, block]), rel=1e-6)


def test_greedy_removal_is_brute_force_at_every_step(checkpoint, samples):
    path = path_of(checkpoint, samples)
    trials = []
    steps = remove_greedily(
        path,
        range(len(samples)),
        removed=(),
        counts={"tower": 1, "decoder": 1},
        candidates=path.blocks,
        on_forwards=trials.append,
    )
    gone = []
    left = {"tower": 1, "decoder": 1}
    for step in steps:
        losses = {
            block: np.mean(answer_losses(remove_blocks(checkpoint, [*gone, block]), samples))
            for block in path.blocks
            if left[block.stack] and block not in gone
        }
        assert step.removed == min(losses, key=losses.get)
        assert dict(step.losses) == pytest.approx(losses, rel=1e-5)
        gone.append(step.removed)
        left[step.removed.stack] -= 1
    assert not any(left.values())
    assert sum(trials) <= count_trials(path.blocks, {"tower": 1, "decoder": 1}) * len(samples)


def test_the_first_removal_is_never_worse_than_that_of_least_influence(checkpoint, samples):
    results = {
        importance.kind: PruneDepth(decoder_blocks=1, importance=importance, held_out=0)
        .apply(checkpoint, samples, RunContext())
        .history[-1]
        for importance in (Greedy(), BlockInfluence())
    }
    chosen = {
        importance: next(row["block"] for row in record.layers if row["removed"])
        for importance, record in results.items()
    }
    loss = {
        row["block"]: row["loss"] for row in results["greedy"].layers if "decoder" in row["part"]
    }
    assert loss[chosen["greedy"]] <= loss[chosen["block_influence"]]


@pytest.mark.parametrize(
    ("importance", "model", "index"),
    [
        # Blocks that these models miss least: with another, a second removal may even help.
        (Greedy(), "pocket-llava", 3),
        (Greedy(), "pocket-smol", 5),
        # Influence does not ask for answers: even the block that turns states most will do.
        (BlockInfluence(), "pocket-llava", 0),
        (BlockInfluence(), "pocket-smol", 5),
    ],
)
def test_a_block_that_does_nothing_goes_first(importance, model, index):
    checkpoint = Checkpoint.load(reference_model_path(model))
    block = Block(stack="decoder", index=index)
    silence(checkpoint, block.name(checkpoint.spec))
    before = logits_of(checkpoint)
    stage = PruneDepth(decoder_blocks=1, importance=importance)
    samples = CalibrationSet.from_reference(1, 4)
    path = path_of(checkpoint, samples)
    pruned = stage.apply(checkpoint, samples, RunContext())
    removed = [row for row in pruned.history[-1].layers if row["removed"]]
    assert [(row["part"], row["block"]) for row in removed] == [("decoder", index)]
    assert torch.equal(logits_of(pruned), before)
    figure = removed[0]["loss" if importance == Greedy() else "influence"]
    expected = path.mean_loss(range(3)) if importance == Greedy() else 0.0
    assert figure == pytest.approx(expected, abs=1e-9)


def test_finished_steps_are_not_measured_again(paths, samples, tmp_path):
    stage = PruneDepth(decoder_blocks=2, held_out=0.2)
    whole = stage.apply(Checkpoint.load(paths["llava"]), samples, RunContext(scratch_dir=tmp_path))
    file = tmp_path / "greedy_blocks.json"
    steps = json.loads(file.read_text())["steps"]
    assert [len(step) for step in steps] == [4, 3]
    # What an interrupted run leaves: a first step, recognisable by a loss that no model has.
    steps[0][3]["loss"] = -1.0
    keep_document(file, {"steps": steps[:1]})
    resumed = stage.apply(
        Checkpoint.load(paths["llava"]), samples, RunContext(scratch_dir=tmp_path)
    )
    assert [row["block"] for row in resumed.history[-1].layers if row["step"] == 1] == [3]
    assert [len(step) for step in json.loads(file.read_text())["steps"]] == [4, 3]
    # A disk that lost power.
    file.write_text("")
    again = stage.apply(Checkpoint.load(paths["llava"]), samples, RunContext(scratch_dir=tmp_path))
    assert again.history[-1].layers == whole.history[-1].layers


def test_progress_counts_forward_passes_up_to_its_total(paths, samples):
    seen = []
    stage = PruneDepth(decoder_blocks=1, tower_blocks=2, held_out=0.2)
    ctx = RunContext(on_progress=seen.append)
    stage.apply(Checkpoint.load(paths["llava"]), samples, ctx)
    assert {progress.total for progress in seen} == {(7 + 6 + 5) * 3}
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert seen[-1].done == seen[-1].total


def unanswered(samples):
    first, *rest = samples
    bare = Sample(image=first.image, question=first.question, answer="", where="data.jsonl:1")
    return CalibrationSet(name="bare", samples=(*rest, bare, bare))


def test_answers_are_needed_where_their_loss_decides(paths, samples):
    checkpoint = Checkpoint.load(paths["llava"])
    data = unanswered(samples)
    with pytest.raises(CalibrationError, match=r"data\.jsonl:1: has no answer"):
        PruneDepth(decoder_blocks=1, held_out=0).apply(checkpoint, data, RunContext())
    stage = PruneDepth(decoder_blocks=1, importance=BlockInfluence(), held_out=0.3)
    record = stage.apply(checkpoint, data, RunContext()).history[-1]
    assert record.notes == ("held-out loss not measured: 2 of 2 samples have no answer",)
    assert "held_out_loss_before" not in record.metrics


@pytest.mark.parametrize("importance", [Greedy(), BlockInfluence()])
def test_what_is_not_finite_is_named(paths, samples, importance):
    checkpoint = Checkpoint.load(paths["llava"])
    norm = checkpoint.model.get_submodule("model.language_model.layers.1.input_layernorm")
    norm.weight.fill_(float("inf"))
    with pytest.raises(CalibrationError, match=r"block [01] of the decoder.*not finite"):
        PruneDepth(decoder_blocks=1, importance=importance).apply(checkpoint, samples, RunContext())


@pytest.mark.parametrize(
    ("weighting", "message"),
    [("gradient", "not blocks; allowed are"), (-1.0, "modality_weights")],
)
def test_a_weighting_that_blocks_do_not_have_is_refused(weighting, message):
    with pytest.raises(ValueError, match=message):
        BlockInfluence(modality_weights=weighting)
