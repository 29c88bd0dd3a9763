"""GBLM against a naive loop over samples in float64, its invariants, and what it sees."""

from __future__ import annotations

import gc
import tempfile
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.calibration.gradients import layer_gradients
from pocketvlm.calibration.gradients.layer_gradients import LayerGradient
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.unstructured import gblm, gradient_norms
from pocketvlm.compress.pruning.unstructured.gblm import Gblm, gradient_scale, score_gblm
from pocketvlm.compress.pruning.unstructured.gradient_norms import (
    GradientNorms,
    NormMean,
    shrink_scatter,
)
from pocketvlm.compress.pruning.unstructured.patterns import Unstructured, select
from pocketvlm.compress.pruning.unstructured.pruner import Prune
from pocketvlm.compress.pruning.unstructured.rules import PruneRule
from pocketvlm.compress.pruning.unstructured.score import PruningTask
from pocketvlm.compress.pruning.unstructured.wanda import Wanda, score_wanda
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError
from pocketvlm.weights.float_weights import keeps_of


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet.from_reference(5, 4)


def steps(seed=0, count=6, tokens=5, rows=4, columns=7, scale=1.0):
    """One layer's gradients, all samples in one batch."""
    generator = torch.Generator().manual_seed(seed)
    return LayerGradient(
        name="layer",
        samples=tuple(range(count)),
        inputs=torch.randn(count, tokens, columns, generator=generator),
        outputs=torch.randn(count, tokens, rows, generator=generator) * scale,
        is_last=True,
    )


def norms_of(step, norm, sizes=None):
    mean = NormMean(norm)
    start = 0
    for size in sizes or (len(step.samples),):
        part = slice(start, start + size)
        mean.add(replace(step, inputs=step.inputs[part], outputs=step.outputs[part]))
        start += size
    assert mean.samples == start
    return mean.result()[0]


def naive_norms(step, norm):
    """Element by element, sample by sample, token by token."""
    inputs, outputs = step.inputs.double(), step.outputs.double()
    count, tokens, rows = outputs.shape
    found = torch.zeros(rows, inputs.shape[-1], dtype=torch.float64)
    for row in range(rows):
        for column in range(inputs.shape[-1]):
            sizes = []
            for n in range(count):
                gradient = sum(
                    float(outputs[n, t, row] * inputs[n, t, column]) for t in range(tokens)
                )
                sizes.append(abs(gradient) if norm == "l1" else gradient**2)
            mean = sum(sizes) / count
            found[row, column] = mean if norm == "l1" else mean**0.5
    return found


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_norms_are_means_over_samples(norm):
    step = steps()
    torch.testing.assert_close(norms_of(step, norm).double(), naive_norms(step, norm))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    norm=st.sampled_from(["l1", "l2"]),
    factor=st.floats(0.001, 1000),
)
def test_norms_depend_on_neither_batches_nor_signs_nor_repetition(seed, sizes, norm, factor):
    step = steps(seed, sum(sizes))
    whole = norms_of(step, norm)
    torch.testing.assert_close(norms_of(step, norm, sizes), whole)
    signs = torch.tensor([(-1.0) ** n for n in step.samples])[:, None, None]
    torch.testing.assert_close(norms_of(replace(step, outputs=step.outputs * signs), norm), whole)
    twice = replace(
        step,
        inputs=torch.cat([step.inputs, step.inputs]),
        outputs=torch.cat([step.outputs, step.outputs]),
        samples=(*step.samples, *step.samples),
    )
    torch.testing.assert_close(norms_of(twice, norm), whole)
    scaled = norms_of(replace(step, outputs=step.outputs * factor), norm)
    # Where terms of a gradient cancel, float32 is as exact as its largest term allows.
    atol = 1e-5 * factor * float(whole.max())
    torch.testing.assert_close(scaled, whole * factor, rtol=1e-5, atol=atol)
    assert bool((norms_of(step, "l2") >= norms_of(step, "l1") * (1 - 1e-5)).all())


def test_a_long_sum_of_small_gradients_keeps_growing():
    step = steps(count=1)
    # In float16, as published, a sum of ones would stop at 2048.
    mean = NormMean("l1")
    for _ in range(5000):
        mean.add(step)
    expected = (step.outputs[0].T @ step.inputs[0]).abs()
    torch.testing.assert_close(mean.result()[0], expected, rtol=1e-4, atol=1e-5)


def few_gradients(norm, count=6, seed=0):
    """A norm of few samples, and what many of the same kind would say."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.rand(size, 1, generator=generator) + 0.2 for size in (40, 60))
    own = torch.rand(40, 60, generator=generator) * 0.3 + 0.85
    means = []
    for samples in (count, 4000):
        mean = NormMean(norm)
        for _ in range(samples):
            # One token a row keeps what a gradient is made of free to choose.
            gradient = rows * columns.T * own * torch.randn(40, 60, generator=generator)
            mean.add(replace(steps(), inputs=gradient[None], outputs=torch.eye(40)[None]))
        means.append(mean)
    return means


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_shrunk_norms_are_nearer_to_those_of_many_samples(norm):
    few, many = few_gradients(norm)
    (plain, signal), (truth, certain) = few.result(), many.result()
    few, _ = few_gradients(norm)
    shrunk, same = few.result(shrink=True)
    assert signal == same
    assert signal < 0.2
    assert certain > 0.7
    assert float((shrunk - truth).norm()) < 0.5 * float((plain - truth).norm())


def test_noise_is_the_variance_of_the_mean():
    step = steps(4, 9)
    pairs = zip(step.outputs, step.inputs, strict=True)
    sizes = torch.stack([(out.T @ seen).abs() for out, seen in pairs])
    mean = NormMean("l1")
    mean.add(step)
    assert mean.noise == pytest.approx(float(sizes.var(dim=0).sum()) / 9, rel=1e-4)
    single = NormMean("l1")
    single.add(steps(4, 1))
    assert single.noise == float("inf")


def test_means_without_noise_stay_and_means_of_noise_become_a_product():
    means = torch.rand(5, 8) + 0.1
    kept, signal = shrink_scatter(means, 0.0)
    assert signal == 1
    torch.testing.assert_close(kept, means)
    smooth, signal = shrink_scatter(means, float("inf"))
    assert signal == 0
    assert int(torch.linalg.matrix_rank(smooth, rtol=1e-4)) == 1
    torch.testing.assert_close(smooth.sum(dim=1), means.sum(dim=1))
    torch.testing.assert_close(smooth.sum(dim=0), means.sum(dim=0))
    zeros, signal = shrink_scatter(torch.zeros(2, 3), 0.0)
    assert signal == 0
    assert not bool(zeros.any())


def test_the_score_is_that_of_a_loop():
    step = steps(3)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(4, 7, generator=generator)
    squares = torch.rand(7, generator=generator)
    norms = norms_of(step, "l2")
    first, second = [], []
    for row in range(4):
        for column in range(7):
            size = abs(float(weights[row, column]))
            first.append(size * float(squares[column]) ** 0.5)
            second.append(size * float(norms[row, column]))
    scale = sum(first) / sum(second)
    expected = [one + 0.7 * scale * two for one, two in zip(first, second, strict=True)]
    found = score_gblm(weights, squares, norms, 0.7)
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    assert gradient_scale(weights, squares, norms) == pytest.approx(scale)
    # At alpha = 1 both terms have the same mean; no weight, no score.
    whole = score_gblm(weights, squares, norms, 1.0)
    assert float(whole.mean()) == pytest.approx(2 * sum(first) / 28)
    assert not score_gblm(torch.zeros(4, 7), squares, norms, 1.0).any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), factor=st.floats(1e-6, 1e6), alpha=st.floats(0, 100))
def test_no_mask_depends_on_the_unit_of_the_loss(seed, factor, alpha):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(4, 7, generator=generator)
    squares = torch.rand(7, generator=generator)
    norms = norms_of(steps(seed), "l1")
    scores = score_gblm(weights, squares, norms, alpha)
    scaled = score_gblm(weights, squares, norms.double() * factor, alpha)
    torch.testing.assert_close(scaled, scores)
    assert bool((scores >= score_wanda(weights, squares)).all())
    assert torch.equal(score_gblm(weights, squares, norms, 0.0), score_wanda(weights, squares))


def test_what_gradients_see_keeps_the_loss_lower_than_size_alone():
    """Classes over correlated inputs of very different scales; the true weights, half removed."""
    generator = torch.Generator().manual_seed(0)
    count, width, classes = 256, 32, 6
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-1, 1, width, dtype=torch.float64)
    inputs = torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing
    inputs = inputs / inputs.std(dim=0) * scales
    weights = torch.randn(classes, width, generator=generator, dtype=torch.float64) / scales.sqrt()
    labels = (inputs @ weights.T).argmax(dim=1)

    def loss(matrix):
        return functional.cross_entropy(inputs @ matrix.T, labels)

    shares = functional.softmax(inputs @ weights.T, dim=1) - functional.one_hot(labels, classes)
    mean = NormMean("l2")
    mean.add(
        LayerGradient(
            name="layer",
            samples=tuple(range(count)),
            inputs=inputs[:, None],
            outputs=shares[:, None],
            is_last=True,
        )
    )
    squares = inputs.square().mean(dim=0)
    kept = weights.numel() // 2
    scores = score_gblm(weights, squares, mean.result()[0], 1.0)
    ours = float(loss(weights * select(scores, Unstructured(), kept)))
    magnitude = float(loss(weights * select(weights.abs(), Unstructured(), kept)))
    assert ours < 0.7 * magnitude


def test_a_row_is_judged_by_the_tokens_on_which_it_matters():
    """Each row is read for one half of the tokens; Wanda sees the mean over both halves."""
    generator = torch.Generator().manual_seed(2)
    count, width = 200, 16
    inputs = torch.randn(count, width, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    first_half = torch.arange(count) < count // 2
    inputs[first_half, width // 2 :] *= 0.1
    inputs[~first_half, : width // 2] *= 0.1
    gates = torch.stack([first_half, ~first_half], dim=1).double()
    weights = torch.randn(2, width, generator=generator, dtype=torch.float64)
    targets = inputs @ weights.T + 0.3 * torch.randn(count, 2, generator=generator)

    def loss(matrix):
        return float((gates * (inputs @ matrix.T - targets)).square().mean())

    outputs = 2 * gates * (inputs @ weights.T - targets)
    mean = NormMean("l1")
    mean.add(
        LayerGradient(
            name="layer",
            samples=tuple(range(count)),
            inputs=inputs[:, None],
            outputs=outputs[:, None],
            is_last=True,
        )
    )
    squares = inputs.square().mean(dim=0)
    scores = {
        "gblm": score_gblm(weights, squares, mean.result()[0], 1.0),
        "wanda": score_wanda(weights, squares),
        "magnitude": weights.abs(),
    }
    losses = {
        name: loss(weights * select(score, Unstructured(), width)) for name, score in scores.items()
    }
    assert losses["gblm"] < 0.7 * min(losses["wanda"], losses["magnitude"])


def chosen_layers(spec):
    """One layer of each part, far from each other."""
    return (
        f"{spec.tower.stack}.0.mlp.fc1",
        spec.projector.linears[-1],
        f"{spec.decoder.stack}.0.self_attn.v_proj",
    )


def naive_scores(checkpoint, path, samples, names, norm, alpha):
    """The stock model in float64: inputs from hooks, gradients from autograd, sample by sample."""
    from transformers import AutoModelForImageTextToText

    stock = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64).eval()
    layers = {name: stock.get_submodule(name) for name in names}
    inputs = {name: [] for name in names}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda _m, given, _o, name=name: inputs[name].append(
                given[0].detach().reshape(-1, given[0].shape[-1])
            )
        )
    sizes = {name: [] for name in names}
    for sample, prompt in zip(samples, encode_samples(checkpoint.processor, samples), strict=True):
        pixels = checkpoint.processor.pixels([sample.open_image()]).double()
        images = pixels if checkpoint.spec.family == "llava" else pixels[:, None]
        logits = stock(input_ids=torch.tensor([prompt.token_ids]), pixel_values=images).logits[0]
        answer = torch.tensor(prompt.token_ids[prompt.answer_start : prompt.answer_end])
        loss = functional.cross_entropy(
            logits[prompt.answer_start - 1 : prompt.answer_end - 1], answer
        )
        found = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
        for name, gradient in zip(names, found, strict=True):
            sizes[name].append(gradient.abs() if norm == "l1" else gradient.square())
    scores = {}
    for name, layer in layers.items():
        norms = sum(sizes[name]) / len(samples)
        norms = norms if norm == "l1" else norms.sqrt()
        size = layer.weight.detach().abs()
        first = size * torch.cat(inputs[name]).square().mean(dim=0).sqrt()
        second = size * norms
        scores[name] = first + alpha * second * first.mean() / second.mean()
    return scores


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_pruned_model_keeps_what_the_naive_score_keeps(tiny_checkpoint, tiny_path, samples, norm):
    names = chosen_layers(tiny_checkpoint.spec)
    # One layer per run: inputs after another pruned layer would not be the stock model's.
    expected = naive_scores(tiny_checkpoint, tiny_path, samples, names, norm, 2.0)
    for name in names:
        dense = tiny_checkpoint.form(name)
        rule = PruneRule(match=name.replace(".", r"\."))
        stage = Prune(score=Gblm(norm=norm, alpha=2.0), rules=(rule,), held_out=0.0)
        pruned = stage.apply(tiny_checkpoint, samples, RunContext())
        mask = keeps_of(pruned.form(name))
        kept = mask.numel() // 2
        assert int(mask.sum()) == kept
        # Two scores that float32 cannot tell apart may change places.
        differs = mask != select(expected[name], Unstructured(), kept)
        assert float(differs.double().mean()) < 0.002
        values = pruned.form(name).dequantize()
        assert torch.equal(values[mask], dense.dequantize()[mask])
        row = next(row for row in pruned.history[-1].layers if row["name"] == name)
        assert row["gradient_scale"] > 0
        assert 0 <= row["gradient_signal"] <= 1
        tiny_checkpoint.set_form(name, dense)


def masks_after(stage, checkpoint, samples, ctx=None):
    """Masks of all pruned layers; the checkpoint is dense again afterwards."""
    names = [linear.name for linear in checkpoint.spec.linears()]
    dense = {name: checkpoint.form(name) for name in names}
    pruned = stage.apply(checkpoint, samples, ctx or RunContext())
    masks = {name: keeps_of(pruned.form(name)) for name in names}
    for name, form in dense.items():
        checkpoint.set_form(name, form)
    return {name: mask for name, mask in masks.items() if mask is not None}


def test_without_alpha_it_is_wanda(tiny_checkpoint, samples, monkeypatch):
    def refuse(*_arguments, **_options):
        raise AssertionError("no gradients are needed")

    monkeypatch.setattr(gblm, "walk_gradients", refuse)
    found = masks_after(Prune(score=Gblm(alpha=0.0)), tiny_checkpoint, samples)
    expected = masks_after(Prune(score=Wanda()), tiny_checkpoint, samples)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    monkeypatch.undo()
    ours = masks_after(Prune(score=Gblm(alpha=3.0)), tiny_checkpoint, samples)
    moved = sum(int((ours[name] != mask).sum()) for name, mask in expected.items())
    assert moved > 0.02 * sum(mask.numel() for mask in expected.values())


@pytest.mark.parametrize("gradient", ["answer", "block"])
def test_masks_depend_on_neither_repetition_nor_batches(
    tiny_checkpoint, samples, monkeypatch, gradient
):
    stage = Prune(score=Gblm(gradient=gradient, alpha=3.0), held_out=0.0)
    few = samples.take(2)
    expected = masks_after(stage, tiny_checkpoint, few)
    monkeypatch.setattr(layer_gradients, "_BATCH_TOKENS", 1)
    twice = CalibrationSet(name="twice", samples=(*few, *few))
    found = masks_after(stage, tiny_checkpoint, twice)
    assert found.keys() == expected.keys()
    for name, mask in found.items():
        # The same, but for scores that float32 cannot tell apart.
        assert float((mask != expected[name]).double().mean()) < 0.002, name


def test_samples_that_only_judge_give_no_gradients(tiny_checkpoint, samples, monkeypatch):
    seen = []

    def walk(checkpoint, given, **options):
        seen.append(given.samples)
        return layer_gradients.walk_gradients(checkpoint, given, **options)

    monkeypatch.setattr(gblm, "walk_gradients", walk)
    masks_after(Prune(score=Gblm(), held_out=0.25), tiny_checkpoint, samples)
    assert seen == [samples.samples[:3]]


def test_a_killed_run_finds_its_gradients(tiny_checkpoint, samples, tmp_path, monkeypatch):
    ctx = RunContext(scratch_dir=tmp_path)
    linears = {linear.name: linear for linear in tiny_checkpoint.spec.linears()}
    names = chosen_layers(tiny_checkpoint.spec)
    tasks = [PruningTask(linear=linears[name], pattern=Unstructured(), kept=64) for name in names]
    Gblm().begin(tiny_checkpoint, tasks, samples, 0.125, ctx)
    files = GradientNorms(tmp_path / "gradients")
    expected = {name: files[name].clone() for name in names}
    monkeypatch.setattr(gblm, "walk_gradients", None)
    Gblm().begin(tiny_checkpoint, tasks, samples, 0.125, ctx)
    monkeypatch.undo()
    # An empty file counts as missing: all are made again, and are the same.
    next((tmp_path / "gradients").iterdir()).write_bytes(b"")
    assert not files.holds(names)
    Gblm().begin(tiny_checkpoint, tasks, samples, 0.125, ctx)
    assert all(torch.equal(files[name], norms) for name, norms in expected.items())


def test_a_stage_shrinks_what_it_is_told_to(tiny_paths, samples, tmp_path):
    found = {}
    for shrink in (False, True):
        checkpoint = Checkpoint.load(tiny_paths["llava"])
        linears = {linear.name: linear for linear in checkpoint.spec.linears()}
        name = chosen_layers(checkpoint.spec)[0]
        task = PruningTask(linear=linears[name], pattern=Unstructured(), kept=64)
        ctx = RunContext(scratch_dir=tmp_path / str(shrink))
        Gblm(shrink=shrink).begin(checkpoint, [task], samples, 0.125, ctx)
        found[shrink] = GradientNorms(tmp_path / str(shrink) / "gradients").read(name)
    (plain, signal), (shrunk, same) = found[False], found[True]
    assert signal == same
    assert signal < 1
    typical, _ = shrink_scatter(plain, float("inf"))
    torch.testing.assert_close(shrunk, typical.lerp(plain, signal))
    assert not bool((shrunk == plain).all())


def test_without_a_scratch_folder_nothing_stays_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    norms = GradientNorms(None)
    norms.collect([replace(steps(), name="a"), replace(steps(), name="b")], ["b"], "l1")
    torch.testing.assert_close(norms["b"], norms_of(steps(), "l1"))
    assert norms.holds(["b"])
    assert not norms.holds(["a", "b"])
    assert len(list(tmp_path.iterdir())) == 1
    del norms
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_means_of_a_block_are_dropped_once_they_are_written(
    tiny_checkpoint, samples, tmp_path, monkeypatch
):
    alive, counts = weakref.WeakSet(), []

    class Counted(NormMean):
        def __init__(self, norm):
            super().__init__(norm)
            alive.add(self)

    monkeypatch.setattr(gradient_norms, "NormMean", Counted)
    parts = ("tower", "projector", "decoder")
    names = [one.name for one in tiny_checkpoint.spec.linears() if one.part in parts]
    walk = layer_gradients.walk_gradients(tiny_checkpoint, samples)
    GradientNorms(tmp_path).collect(walk, names, "l1", lambda _: counts.append(len(alive)))
    assert len(counts) == len(names)
    assert max(counts) <= 7


@pytest.mark.parametrize("options", [{"alpha": -1.0}, {"alpha": float("nan")}, {"norm": "l3"}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match="alpha must be|allowed are l1, l2"):
        Gblm(**options)


def test_answers_are_needed_for_their_gradient_alone(tiny_checkpoint, samples):
    silent = CalibrationSet(
        name="silent", samples=tuple(replace(sample, answer="") for sample in samples)
    )
    with pytest.raises(CalibrationError, match="reference scene 0: has no answer"):
        Prune(score=Gblm()).apply(tiny_checkpoint, silent, RunContext())
    assert masks_after(Prune(score=Gblm(gradient="block")), tiny_checkpoint, silent)
