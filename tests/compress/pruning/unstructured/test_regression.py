"""Regression of what is kept: against dense least squares, row by row, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.calibration.walk.steps import FinishedSublayer, LinearGroup
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.hessian import InputHessian
from pocketvlm.compress.pruning.unstructured.magnitude import Magnitude
from pocketvlm.compress.pruning.unstructured.pruner import Prune
from pocketvlm.compress.pruning.unstructured.regression import (
    aligned_targets,
    fit_kept,
    refit_layer,
    refit_sublayer,
    sublayer_statistics,
)
from pocketvlm.context import RunContext
from pocketvlm.weights.sparse import SparseWeight


def _problem(seed: int, rows: int = 7, columns: int = 20, tokens: int = 200, ratio: float = 0.6):
    """Correlated inputs, the float model's inputs beside them, a weight and a magnitude mask."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = draw(tokens, columns) @ (draw(columns, columns) / 3)
    ideal = inputs + 0.3 * draw(tokens, columns)
    weight = draw(rows, columns)
    kept = max(1, round(columns * (1 - ratio)))
    places = weight.abs().topk(kept, dim=1).indices
    keeps = torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, places, value=True)
    return inputs, ideal, weight, keeps


def _loss(values: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of every row's outputs."""
    return (inputs @ values.T - outputs).square().mean(dim=0)


def _textbook(weight, keeps, inputs, outputs):
    """Least squares of every row on its own columns, by an orthogonal decomposition of the data."""
    found = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        chosen = keeps[row]
        solution = torch.linalg.lstsq(inputs[:, chosen], outputs[:, row], driver="gelsd").solution
        found[row, chosen] = solution
    return found


@pytest.mark.parametrize("drifts", [False, True])
def test_equals_least_squares_of_every_row(drifts: bool) -> None:
    inputs, ideal, weight, keeps = _problem(0)
    outputs = (ideal if drifts else inputs) @ weight.T
    H = inputs.T @ inputs / len(inputs)
    drift = (ideal - inputs).T @ inputs / len(inputs) if drifts else None
    found = fit_kept(
        weight,
        keeps,
        H,
        aligned_targets(weight, H, drift),
        damping=0.0,
        iterations=200,
        tolerance=1e-12,
    )
    torch.testing.assert_close(
        found, _textbook(weight, keeps, inputs, outputs), rtol=1e-7, atol=1e-9
    )


def test_damping_is_least_squares_with_the_start_as_further_rows() -> None:
    inputs, _, weight, keeps = _problem(1)
    H = inputs.T @ inputs / len(inputs)
    pull = 0.05 * float(H.diagonal().mean())
    found = fit_kept(weight, keeps, H, weight @ H, damping=0.05, iterations=200, tolerance=1e-12)
    root = (pull * len(inputs)) ** 0.5
    more = torch.cat([inputs, root * torch.eye(inputs.shape[1], dtype=torch.float64)])
    outputs = torch.cat([inputs @ weight.T, root * (weight * keeps).T])
    torch.testing.assert_close(found, _textbook(weight, keeps, more, outputs), rtol=1e-7, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    columns=st.integers(1, 24),
    tokens=st.integers(1, 40),
    ratio=st.floats(0.0, 0.95),
    iterations=st.integers(0, 30),
)
def test_no_row_gets_worse_and_zeros_stay(seed, columns, tokens, ratio, iterations) -> None:
    inputs, ideal, weight, keeps = _problem(seed, columns=columns, tokens=tokens, ratio=ratio)
    H = inputs.T @ inputs / tokens
    outputs = ideal @ weight.T
    targets = aligned_targets(weight, H, (ideal - inputs).T @ inputs / tokens)
    found = fit_kept(weight, keeps, H, targets, iterations=iterations)
    before, after = _loss(weight * keeps, inputs, outputs), _loss(found, inputs, outputs)
    assert bool((after <= before + 1e-9 * (1 + before)).all())
    assert not bool(found[~keeps].any())
    if iterations == 0:
        assert torch.equal(found, weight * keeps)


def test_every_iteration_lowers_the_loss() -> None:
    inputs, ideal, weight, keeps = _problem(2, columns=60, rows=12)
    H = inputs.T @ inputs / len(inputs)
    targets = aligned_targets(weight, H, (ideal - inputs).T @ inputs / len(inputs))
    losses = [
        float(
            _loss(
                fit_kept(weight, keeps, H, targets, iterations=count, damping=0.0, tolerance=0.0),
                inputs,
                ideal @ weight.T,
            ).sum()
        )
        for count in range(12)
    ]
    assert all(later < earlier for earlier, later in pairwise(losses))


def test_columns_that_no_token_excites_keep_their_values() -> None:
    inputs, _, weight, keeps = _problem(3)
    inputs[:, 4] = 0
    keeps[:, 4] = True
    H = inputs.T @ inputs / len(inputs)
    found = fit_kept(weight, keeps, H, weight @ H)
    assert torch.equal(found[:, 4], weight[:, 4])
    assert not torch.equal(found, weight * keeps)


def _prune(checkpoint, name: str, ratio: float) -> SparseWeight:
    form = checkpoint.form(name)
    dense = form.dequantize()
    kept = round(dense.shape[1] * (1 - ratio))
    mask = torch.zeros(dense.shape, dtype=torch.bool)
    mask.scatter_(1, dense.abs().topk(kept, dim=1).indices, value=True)
    return SparseWeight.from_form(form, mask)


def test_layers_and_halves_of_a_model_come_nearer_to_the_float_model(tiny_checkpoint) -> None:
    """Half of every layer is removed; whatever is kept is no worse on held-out tokens."""
    samples = CalibrationSet.from_reference(3, 24)
    spec = tiny_checkpoint.spec
    wanted = {item.name for item in spec.linears() if item.part in ("tower", "decoder")}
    walk = BlockWalk(checkpoint=tiny_checkpoint, samples=samples, held_out=0.25, carry_float=True)
    layers, sublayers, gains = 0, 0, []
    for step in walk:
        if isinstance(step, LinearGroup):
            names = [name for name in step.names if name in wanted]
            hessian = None
            if names and step.moments is not None:
                moments = step.moments(None)
                hessian = InputHessian.from_moments(moments)
            for name in names:
                weight, pruned = tiny_checkpoint.form(name), _prune(tiny_checkpoint, name, 0.5)
                assert hessian is not None
                refitted = refit_layer(weight, pruned, hessian)
                assert (refitted.after < refitted.before) == refitted.is_kept
                assert isinstance(refitted.form, SparseWeight)
                assert torch.equal(refitted.form.mask, pruned.mask)
                gains.append(refitted.before - refitted.after)
                tiny_checkpoint.set_form(name, refitted.form)
                layers += 1
        elif isinstance(step, FinishedSublayer):
            _check_sublayer(tiny_checkpoint, step)
            sublayers += 1
    assert layers == len(wanted)
    assert sublayers == 2 * (spec.tower.feature_block + 1 + spec.decoder.depth)
    assert sum(gain > 0 for gain in gains) > 0.8 * len(gains)


def _check_sublayer(checkpoint, step: FinishedSublayer) -> None:
    """The statistics' loss is that of the states themselves, before and after."""
    name = step.sublayer.last
    _, held_out = sublayer_statistics(step)
    assert held_out is not None
    refitted = refit_sublayer(step, checkpoint.form(name))
    assert refitted.judged_on == "held-out tokens"

    def distance() -> float:
        lost = whole = 0.0
        bias = checkpoint.layer(name).bias
        for index, batch in enumerate(step.batches):
            if batch is None or not batch.held_out:
                continue
            behind = step.sublayer.run(step.inputs[index], step.rows_of(index))
            weights = step.weights_of(index)
            share = torch.ones(behind.shape[:-1]) if weights is None else weights
            wanted = step.targets[index] - step.inputs[index] - (0 if bias is None else bias)
            lost += float(((step.targets[index] - behind).double().square().sum(-1) * share).sum())
            whole += float((wanted.double().square().sum(-1) * share).sum())
        return lost / whole

    assert distance() == pytest.approx(refitted.before, rel=1e-3)
    if refitted.is_kept:
        checkpoint.set_form(name, refitted.form)
        assert distance() == pytest.approx(refitted.after, rel=1e-3)
        assert refitted.after < refitted.before


def test_update_of_a_stage_keeps_masks_and_comes_nearer(tiny_path, tmp_path) -> None:
    """Same masks as without the update, every half no worse, and a killed run ends alike."""
    samples = CalibrationSet.from_reference(3, 12)
    plain = Prune(score=Magnitude(), ratio=0.5).apply(
        Checkpoint.load(tiny_path), samples, RunContext()
    )
    stage = Prune(score=Magnitude(), ratio=0.5, update="regression")
    fitted = stage.apply(Checkpoint.load(tiny_path), samples, RunContext(scratch_dir=tmp_path))
    for linear, form in plain.forms().items():
        if isinstance(form, SparseWeight):
            assert torch.equal(form.mask, fitted.form(linear.name).mask)
    sublayers = [row for row in fitted.history[-1].layers if "half_update_kept" in row]
    assert len(sublayers) == 2 * (plain.spec.tower.feature_block + 1 + plain.spec.decoder.depth)
    for row in sublayers:
        better = row["half_loss_after_update"] < row["half_loss_before_update"]
        assert row["half_update_kept"] == better
    assert sum(row["half_update_kept"] for row in sublayers) > len(sublayers) / 2
    for name in ("q_proj", "fc2.refitted", "down_proj"):
        for file in tmp_path.glob(f"*{name}-*.safetensors"):
            file.unlink()
    again = stage.apply(Checkpoint.load(tiny_path), samples, RunContext(scratch_dir=tmp_path))
    for linear, form in fitted.forms().items():
        assert torch.equal(form.dequantize(), again.form(linear.name).dequantize())


def test_an_unknown_update_is_refused() -> None:
    with pytest.raises(ValueError, match="allowed are none, regression"):
        Prune(score=Magnitude(), update="ols")  # type: ignore[arg-type]
