"""Asymmetric calibration: weights that make up for what the layers before them have spoilt."""

from __future__ import annotations

import numpy as np
import torch

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.walk.moments import CrossMoment, SecondMoment
from pocketvlm.calibration.walk.steps import Drift, InputMoments
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.error_feedback import factorize
from pocketvlm.compress.layerwise.hessian import ErrorFeedback, InputHessian, align_to_float
from pocketvlm.compress.quantization.affine.gptq import AffineQuantizer, Gptq
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.rules import Assignment
from pocketvlm.context import RunContext
from pocketvlm.models.layers import LinearSpec
from pocketvlm.weights.dense import DenseWeight


def drifted_inputs(columns=24, tokens=400, seed=0):
    """Inputs of the float model, and of a quantized one that distorts and mixes them."""
    rng = np.random.default_rng(seed)
    ideal = rng.normal(size=(tokens, columns)) @ rng.normal(size=(columns, columns))
    distortion = np.eye(columns) * 0.9 + 0.05 * rng.normal(size=(columns, columns))
    return ideal, ideal @ distortion + 0.2 * rng.normal(size=(tokens, columns))


def moments_of(ideal, now):
    columns = now.shape[1]
    own, cross, drift = SecondMoment(columns), CrossMoment(columns), SecondMoment(columns)
    x, d = torch.from_numpy(now), torch.from_numpy(ideal - now)
    own.add(x)
    cross.add_pairs(d, x)
    drift.add(d)
    return InputMoments(calibration=own, held_out=None, drift=Drift(cross=cross, own=drift))


def test_the_moved_target_is_the_least_squares_solution():
    ideal, now = drifted_inputs()
    W = np.random.default_rng(1).normal(size=(5, now.shape[1]))
    expected, *_ = np.linalg.lstsq(now, ideal @ W.T, rcond=None)
    H = torch.from_numpy(now.T @ now / len(now))
    cross = torch.from_numpy((ideal - now).T @ now / len(now))
    factor = factorize(H, group_size=8, damping=0.0, order="group_aware")
    moved = torch.from_numpy(W) + align_to_float(torch.from_numpy(W), factor, cross)
    np.testing.assert_allclose(moved.numpy(), expected.T, rtol=1e-6, atol=1e-8)


def test_outputs_come_closer_to_the_float_models_and_the_loss_says_by_how_much():
    ideal, now = drifted_inputs()
    W = np.random.default_rng(2).normal(size=(16, now.shape[1]))
    linear = LinearSpec(
        name="layer",
        part="decoder",
        role="q_proj",
        block=0,
        out_features=16,
        in_features=now.shape[1],
        has_bias=False,
    )
    found = {}
    for share in (0.0, 1.0):
        feedback = ErrorFeedback(damping=0.01, order="group_aware", drift_share=share)
        layer = AffineQuantizer().compress(
            Assignment(linear=linear, rule=WeightRule(bits=4, group_size=8)),
            DenseWeight(values=torch.from_numpy(W).float()),
            InputHessian.from_moments(moments_of(ideal, now), feedback),
        )
        outputs = now @ layer.form.dequantize().double().numpy().T
        wanted = ideal @ W.T
        error = np.square(outputs - wanted).sum() / np.square(now @ W.T).sum()
        np.testing.assert_allclose(layer.row["loss"], error, rtol=1e-3)
        found[share] = error
    assert found[1.0] < 0.7 * found[0.0]


def test_a_stage_follows_the_float_model(tiny_path):
    """With the tower spoilt first, the later halves end nearer to the float model's outputs."""
    samples = CalibrationSet.from_reference(0, 8)
    losses = {}
    for share in (0.0, 1.0):
        stage = Gptq(rules=(WeightRule(bits=2, group_size=32),), drift_share=share)
        done = stage.apply(Checkpoint.load(tiny_path), samples, RunContext())
        record = done.history[-1]
        assert record.parameters["drift_share"] == share
        losses[share] = [row["loss"] for row in record.layers if "loss" in row]
    assert len(losses[0.0]) == len(losses[1.0])
    # The first layer has nothing to make up for.
    assert losses[0.0][0] == losses[1.0][0]
