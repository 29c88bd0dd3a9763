"""SparseGPT against optimal brain surgery written down plainly, and against what it must beat."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.walk.moments import SecondMoment
from pocketvlm.calibration.walk.steps import InputMoments
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise import hessian as hessian_module
from pocketvlm.compress.layerwise.hessian import ErrorFeedback, InputHessian
from pocketvlm.compress.pruning.unstructured.masked_rounding import mask_columns
from pocketvlm.compress.pruning.unstructured.method import PruningMethod
from pocketvlm.compress.pruning.unstructured.patterns import (
    Blocked,
    SemiStructured,
    Unstructured,
    select,
)
from pocketvlm.compress.pruning.unstructured.pruner import Prune
from pocketvlm.compress.pruning.unstructured.rules import PruneRule
from pocketvlm.compress.pruning.unstructured.score import PruningTask
from pocketvlm.compress.pruning.unstructured.sparsegpt import SparseGpt, prune_with_feedback
from pocketvlm.compress.pruning.unstructured.sparsegpt_gptq import SparseGptGptq, prune_and_quantize
from pocketvlm.compress.pruning.unstructured.wanda import score_wanda
from pocketvlm.compress.quantization.affine.gptq import AffineQuantizer
from pocketvlm.compress.quantization.affine.rtn import RoundToNearest, round_to_nearest
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError, RecipeError
from pocketvlm.models.layers import LinearSpec
from pocketvlm.stages import PlanState
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.nonzeros import AffineNonzeros, FloatNonzeros
from pocketvlm.weights.sparse import SparseWeight

PATTERNS = {
    "unstructured": Unstructured(),
    "2:4": SemiStructured(),
    "4:8": SemiStructured(keep=4, of=8),
    "blocks": Blocked(rows=2, columns=4),
}


def problem(rows, columns, *, seed=0, dead=(), tokens=400):
    """A weight whose rows differ in size, and the moments of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    X = torch.randn(tokens, columns, generator=generator) @ mixing
    X *= torch.exp(0.6 * torch.randn(columns, generator=generator))
    X += 0.5 * torch.randn(tokens, 1, generator=generator)
    X[:, list(dead)] = 0
    W = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    W *= torch.exp(0.5 * torch.randn(rows, 1, generator=generator))
    moment = SecondMoment(columns)
    moment.add(X)
    return W, InputMoments(calibration=moment, held_out=None)


def hessian_of(moments, *, order="natural", damping=0.01):
    return InputHessian.from_moments(moments, ErrorFeedback(damping=damping, order=order))


def prune(W, moments, pattern, kept, *, compare="rows", width=None):
    width = width or mask_columns(pattern)
    hessian = hessian_of(moments)
    return prune_with_feedback(
        W, hessian, hessian.factors(width), pattern, kept, compare=compare, width=width
    )


def output_loss(values, W, moments):
    D = values.double() - W
    (H,) = moments.calibration.blocks()
    return float(torch.einsum("ri,ij,rj->", D, H.double(), D))


def half(W, pattern):
    elements = pattern.elements
    return W.numel() // 2 // elements * elements


# A second implementation, in numpy: no Cholesky factor, every inverse by itself.


def surgeon_pivot(H, column):
    """[H^-1]_jj of the problem in which all columns before j are fixed."""
    return np.linalg.inv(H[column:, column:])[0, 0]


def surgeon_remove(w, H, column):
    """Drops one weight of a row and moves those after it as the exact inverse says."""
    inverse = np.linalg.inv(H[column:, column:])
    w[column:] -= w[column] / inverse[0, 0] * inverse[:, 0]


def textbook_sparsegpt(W, H, *, kept, width, compare, damping=0.01):
    """Unstructured pruning, one weight of one row after another."""
    W, H = W.copy(), H.copy()
    rows, columns = W.shape
    H += np.eye(columns) * damping * H.diagonal().mean()
    pivots = np.array([surgeon_pivot(H, column) for column in range(columns)])
    scores = W**2 / pivots
    plan = np.zeros((rows, columns), dtype=bool)
    if compare == "layer":
        plan.flat[np.argsort(-scores, axis=None)[:kept]] = True
    else:
        for row in range(rows):
            count = (row + 1) * kept // rows - row * kept // rows
            plan[row, np.argsort(-scores[row])[:count]] = True
    mask = np.zeros((rows, columns), dtype=bool)
    for start in range(0, columns, width):
        group = slice(start, min(start + width, columns))
        now = W[:, group] ** 2 / pivots[group]
        if compare == "layer":
            chosen = np.zeros(now.shape, dtype=bool)
            chosen.flat[np.argsort(-now, axis=None)[: plan[:, group].sum()]] = True
            mask[:, group] = chosen
        for row in range(rows):
            if compare == "rows":
                best = np.argsort(-now[row])[: plan[row, group].sum()]
                mask[row, start + best] = True
            for column in range(group.start, group.stop):
                if not mask[row, column]:
                    surgeon_remove(W[row], H, column)
    return mask, np.where(mask, W, 0.0)


@pytest.mark.parametrize("compare", ["rows", "layer"])
@pytest.mark.parametrize(("columns", "width"), [(40, 8), (44, 32), (24, 24)])
def test_agrees_with_the_surgeon_on_every_weight(columns, width, compare):
    W, moments = problem(6, columns, seed=columns)
    (H,) = moments.calibration.blocks()
    options = {"kept": 6 * columns // 2 + 5, "width": width, "compare": compare}
    mask, values = textbook_sparsegpt(W.numpy(), H.double().numpy(), **options)
    found = prune(W, moments, Unstructured(), **options)
    np.testing.assert_array_equal(found[0].numpy(), mask)
    np.testing.assert_allclose(found[1].numpy(), values, rtol=1e-7, atol=1e-9)


def test_one_dropped_weight_is_made_up_for_as_least_squares_would():
    """Dropping only in the first column, the others can answer fully: the optimum is known."""
    W, moments = problem(4, 16, seed=1)
    W[:, 0] = 1e-3  # what every row drops
    (H,) = moments.calibration.blocks()
    H = H.double()
    mask, values = prune(W, moments, Unstructured(), 4 * 15)
    assert not mask[:, 0].any()
    damped = H + torch.eye(16, dtype=torch.float64) * 0.01 * H.diagonal().mean()
    best = W[:, 1:] + W[:, :1] * torch.linalg.solve(damped[1:, 1:], damped[1:, 0])
    torch.testing.assert_close(values[:, 1:], best)


@pytest.mark.parametrize("compare", ["rows", "layer"])
@pytest.mark.parametrize("name", PATTERNS)
def test_loses_less_output_than_wanda_and_magnitude(name, compare):
    pattern = PATTERNS[name]
    W, moments = problem(32, 128, seed=2)
    hessian = hessian_of(moments)
    kept = half(W, pattern)
    wanda = W * select(score_wanda(W, hessian.importance), pattern, kept)
    magnitude = W * select(W.abs(), pattern, kept)
    _, values = prune(W, moments, pattern, kept, compare=compare)
    loss = output_loss(values, W, moments)
    assert loss < 0.7 * output_loss(wanda, W, moments)
    assert loss < 0.5 * output_loss(magnitude, W, moments)


def test_comparing_the_layer_loses_less_than_comparing_rows():
    W, moments = problem(32, 128, seed=3)
    losses = [
        output_loss(prune(W, moments, Unstructured(), W.numel() // 2, compare=c)[1], W, moments)
        for c in ("layer", "rows")
    ]
    assert losses[0] < 0.8 * losses[1]


def published(W, moments, width=128):
    """As the paper has it: the same share of every group of 128 columns, over all rows."""
    (factor,) = hessian_of(moments).factors(width)
    U, current = factor.upper, W.clone()
    values = torch.zeros_like(W)
    for start in range(0, W.shape[1], width):
        end = min(start + width, W.shape[1])
        scores = current[:, start:end].square() / U.diagonal()[start:end].square()
        threshold = scores.flatten().sort().values[scores.numel() // 2]
        for column in range(start, end):
            keeps = scores[:, column - start] >= threshold
            values[:, column] = current[:, column] * keeps
            error = (current[:, column] - values[:, column]) / U[column, column]
            current[:, column:] -= error[:, None] * U[column, column:]
    return values


def test_shares_that_follow_the_scores_beat_the_published_ones():
    W, moments = problem(32, 256, seed=4, tokens=800)
    _, values = prune(W, moments, Unstructured(), W.numel() // 2, compare="layer")
    ours, theirs = (output_loss(made, W, moments) for made in (values, published(W, moments)))
    assert ours < 0.95 * theirs


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 9),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 10_000),
    name=st.sampled_from(sorted(PATTERNS)),
    compare=st.sampled_from(["rows", "layer"]),
)
@settings(max_examples=30, deadline=None)
def test_counts_are_exact_and_zeros_are_zero(rows, columns, share, seed, name, compare):
    pattern = PATTERNS[name]
    W, moments = problem(2 * rows, 8 * columns, seed=seed)
    kept = round(share * W.numel()) // pattern.elements * pattern.elements
    if isinstance(pattern, SemiStructured):
        kept = W.numel() // 2
    mask, values = prune(W, moments, pattern, kept, compare=compare)
    assert int(mask.sum()) == kept
    assert bool((values[~mask] == 0).all())
    assert bool(torch.isfinite(values).all())
    if isinstance(pattern, SemiStructured):
        assert set(mask.view(-1, pattern.of).sum(1).tolist()) == {pattern.keep}
    if isinstance(pattern, Blocked):
        blocks = mask.view(rows, 2, 2 * columns, 4).sum(dim=(1, 3))
        assert set(blocks.flatten().tolist()) <= {0, 8}
    if isinstance(pattern, Unstructured) and compare == "rows":
        assert int(mask.sum(1).max() - mask.sum(1).min()) <= 1


def test_rows_do_not_see_each_other():
    W, moments = problem(8, 48, seed=5)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    mask, values = prune(W, moments, Unstructured(), W.numel() // 2)
    moved, turned = prune(W[order], moments, Unstructured(), W.numel() // 2)
    assert torch.equal(moved, mask[order])
    torch.testing.assert_close(turned, values[order])


def test_dead_columns_go_first_and_only_as_far_as_the_count_asks():
    dead = (0, 7, 31)
    W, moments = problem(4, 32, seed=6, dead=dead)
    W[:, list(dead)] = 100.0
    mask, _ = prune(W, moments, Unstructured(), 4 * 16)
    assert not mask[:, list(dead)].any()
    mask, values = prune(W, moments, Unstructured(), 4 * 31)
    assert mask[:, list(dead)].sum() == 4 * 2
    assert bool((values[:, list(dead)][mask[:, list(dead)]] == 100).all())


def test_a_layer_of_zeros_stays_one():
    _, moments = problem(4, 32, seed=7)
    mask, values = prune(torch.zeros(4, 32, dtype=torch.float64), moments, Unstructured(), 64)
    assert int(mask.sum()) == 64
    assert not values.any()


def test_weights_that_are_not_finite_are_named():
    W, moments = problem(4, 32, seed=8)
    W[1, 2] = float("nan")
    with pytest.raises(CalibrationError, match="not finite"):
        prune(W, moments, Unstructured(), 64)


# In one pass with GPTQ.

LINEAR = LinearSpec(
    name="layer",
    part="decoder",
    role="q_proj",
    block=0,
    out_features=32,
    in_features=128,
    has_bias=False,
)
RULE = WeightRule(bits=3, group_size=16)


@pytest.mark.parametrize("order", ["natural", "group_aware"])
@pytest.mark.parametrize("name", PATTERNS)
def test_one_pass_prunes_and_rounds(name, order):
    pattern = PATTERNS[name]
    W, moments = problem(32, 128, seed=9)
    task = PruningTask(linear=LINEAR, pattern=pattern, kept=half(W, pattern))
    hessian = hessian_of(moments, order=order)
    form = prune_and_quantize(W, hessian, RULE, task)
    assert isinstance(form.values, AffineNonzeros)
    assert form.kept == task.kept
    assert bool((form.dequantize()[~form.keeps()] == 0).all())
    scores = score_wanda(W, hessian.importance)
    wanda = SparseWeight.from_form(DenseWeight(values=W), select(scores, pattern, task.kept))
    rounded, _ = round_to_nearest(wanda, scheme=RULE.scheme, group_size=16)
    loss = output_loss(form.dequantize(), W, moments)
    assert loss < 0.8 * output_loss(rounded.dequantize(), W, moments)


def test_one_pass_that_drops_nothing_is_gptq():
    W, moments = problem(32, 128, seed=10)
    hessian = hessian_of(moments, order="group_aware")
    task = PruningTask(linear=LINEAR, pattern=Unstructured(), kept=W.numel())
    form = prune_and_quantize(W, hessian, RULE, task)
    expected = AffineQuantizer().fit(RULE, LINEAR, DenseWeight(values=W), hessian)
    assert torch.equal(form.dequantize(), expected.dequantize())


@pytest.mark.parametrize("name", ["unstructured", "2:4"])
def test_one_pass_loses_less_than_two(name):
    pattern = PATTERNS[name]
    W, moments = problem(32, 128, seed=11)
    hessian = hessian_of(moments)
    kept = W.numel() // 2
    task = PruningTask(linear=LINEAR, pattern=pattern, kept=kept)
    together = prune_and_quantize(W, hessian, RULE, task)
    mask, values = prune(W, moments, pattern, kept, width=mask_columns(pattern, 16))
    pruned = SparseWeight.from_form(DenseWeight(values=values), mask)
    apart = AffineQuantizer().fit(RULE, LINEAR, pruned, hessian)
    losses = [output_loss(form.dequantize(), W, moments) for form in (together, apart)]
    assert losses[0] < 0.98 * losses[1]


@pytest.mark.parametrize("order", ["natural", "group_aware"])
def test_a_mask_is_chosen_within_groups_of_the_factor_as_without_them(order):
    """Columns choose when they are reached, whichever groups a grid has beside."""
    W, moments = problem(8, 64, seed=13)
    kept = W.numel() // 2
    hessian = hessian_of(moments, order=order)
    wide = {"natural": 64, "group_aware": 8}[order]
    found = prune_with_feedback(
        W, hessian, hessian.factors(wide), PATTERNS["4:8"], kept, compare="rows", width=8
    )
    if order == "natural":
        expected = prune(W, moments, PATTERNS["4:8"], kept)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert set(found[0].view(-1, 8).sum(1).tolist()) == {4}


# Whole models.


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet.from_reference(0, 6)


@pytest.mark.parametrize(
    "stage",
    [
        Prune(score=SparseGpt(compare="layer"), ratio=0.6),
        Prune(score=SparseGpt(), pattern=SemiStructured()),
    ],
)
def test_the_stage_prunes_the_model(tiny_paths, samples, tmp_path, stage):
    done = stage.apply(Checkpoint.load(tiny_paths["smolvlm"]), samples, RunContext())
    record = done.history[-1]
    rows = [row for row in record.layers if row["method"] == "pruned"]
    for row in rows:
        form = done.form(row["name"])
        assert isinstance(form.values, FloatNonzeros)
        assert form.kept == row["kept"]
        assert row["damping"] >= 0.01
    assert sum(row["loss"] < row["loss_magnitude"] for row in rows) > 0.9 * len(rows)
    assert record.metrics["sparsity"] == pytest.approx(stage.ratio, abs=1e-3)
    json.dumps(record.layers, allow_nan=False)
    done.save(tmp_path / "saved")
    back = Checkpoint.load(tmp_path / "saved")
    for linear, form in done.forms().items():
        assert torch.equal(back.form(linear.name).dequantize(), form.dequantize())


def test_a_hessian_without_a_factor_is_told(monkeypatch):
    W, moments = problem(32, 128, seed=12)
    score = SparseGpt()
    method = PruningMethod(feedback=score.feedback, pruner=score, refits=False)
    hessian = InputHessian.from_moments(moments, method.feedback)
    monkeypatch.setattr(hessian_module, "factorize", lambda *_, **__: None)
    task = PruningTask(linear=LINEAR, pattern=Unstructured(), kept=W.numel() // 2)
    done = method.compress(task, DenseWeight(values=W.float()), hessian)
    assert "Cholesky" in done.row["reason"]
    scores = score_wanda(W.float(), hessian.importance)
    assert torch.equal(done.form.keeps(), select(scores, Unstructured(), task.kept))


JOINT = SparseGptGptq(
    rules=(WeightRule(part="embedding", bits=8, group_size=16), RULE),
    prune_rules=(PruneRule(part="projector", ratio=0.0), PruneRule(ratio=None)),
)


def test_the_joint_stage_prunes_and_quantizes_the_model(tiny_paths, samples, tmp_path):
    checkpoint = Checkpoint.load(tiny_paths["smolvlm"])
    planned = JOINT.plan(PlanState.of(checkpoint.spec)).layouts
    done = JOINT.apply(checkpoint, samples, RunContext(scratch_dir=tmp_path))
    record = done.history[-1]
    rows = {row["name"]: row for row in record.layers}
    assert record.method == "sparsegpt_gptq"
    assert record.metrics["sparsity"] == pytest.approx(0.5, abs=1e-3)
    for linear, form in done.forms().items():
        assert planned[linear].stored_bytes(*form.shape) == form.stored_bytes
        row = rows[linear.name]
        if linear.part in ("tower", "decoder"):
            assert isinstance(form.values, AffineNonzeros)
            assert row["sparsity"] == pytest.approx(0.5, abs=0.01)
            assert row["method"] in ("sparsegpt_gptq", "magnitude_rtn")
        else:
            assert isinstance(form, AffineWeight)
            assert row["method"] in ("gptq", "rtn")
    fitted = [row for row in rows.values() if row["method"] == "sparsegpt_gptq"]
    assert len(fitted) > len(rows) / 2
    assert all(row["loss"] < row["loss_rtn"] for row in fitted)
    json.dumps(record.layers, allow_nan=False)
    resumed = JOINT.apply(
        Checkpoint.load(tiny_paths["smolvlm"]), samples, RunContext(scratch_dir=tmp_path)
    )
    for linear, form in done.forms().items():
        assert torch.equal(resumed.form(linear.name).dequantize(), form.dequantize())
    with pytest.raises(RecipeError, match="quantized already"):
        RoundToNearest(rules=(RULE,)).apply(done, samples, RunContext())


def test_a_row_may_have_one_scale_where_its_hessian_is_whole(tiny_paths, samples, monkeypatch):
    stage = replace(JOINT, rules=(WeightRule(bits=4, group_size=None),))
    done = stage.apply(Checkpoint.load(tiny_paths["smolvlm"]), samples, RunContext())
    pruned = [form for form in done.forms().values() if isinstance(form, SparseWeight)]
    assert pruned
    assert all(form.values.scales.shape == (form.shape[0], 1) for form in pruned)
    monkeypatch.setattr(hessian_module, "_WHOLE_WIDTH", 64)
    monkeypatch.setattr(hessian_module, "_BLOCK_WIDTH", 40)
    with pytest.raises(RecipeError, match="whole Hessian.* give a group_size of at most 40"):
        stage.plan(PlanState.of(done.spec))


def test_a_pruned_layer_without_bits_is_refused(tiny_paths):
    spec = Checkpoint.load(tiny_paths["smolvlm"]).spec
    rules = (WeightRule(part="decoder", bits=None), RULE)
    with pytest.raises(RecipeError, match=r"is pruned and no rule gives it bits.*ratio 0"):
        replace(JOINT, rules=rules).plan(PlanState.of(spec))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"compare": "columns"}, "compare 'columns' is unknown; allowed are rows, layer"),
        ({"ratio": 1.0}, "ratio"),
        ({"damping": 2.0}, "damping"),
        ({"pattern": SemiStructured(), "ratio": 0.6}, "ratio must be 0.5"),
    ],
)
def test_values_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        replace(JOINT, **options)
    own = {name: options[name] for name in ("compare", "damping") if name in options}
    rest = {name: value for name, value in options.items() if name not in own}
    with pytest.raises(ValueError, match=match):
        Prune(score=SparseGpt(**own), **rest)


def test_a_group_that_cuts_the_pattern_is_refused():
    with pytest.raises(ValueError, match="group_size 12 is not a multiple of the 8 columns of 4:8"):
        SparseGptGptq(
            rules=(WeightRule(bits=4, group_size=12),), pattern=SemiStructured(keep=4, of=8)
        )
