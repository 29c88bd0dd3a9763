"""Layers whose inputs int8 cannot bear are found on calibration data, and take groups."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.walk.moments import SecondMoment
from pocketvlm.calibration.walk.steps import InputMoments
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.hessian import InputHessian
from pocketvlm.compress.quantization.affine.gptq import Gptq
from pocketvlm.compress.quantization.affine.outliers import MOST_LOST, input_loss
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.context import RunContext
from pocketvlm.models.layers import Part
from pocketvlm.reference_graph.activation_rounding import input_rounding
from pocketvlm.stages import PlanState
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.layout import AffineLayout

ROWS = WeightRule(part="tower", bits=8, group_size=None, symmetric=True)


def hessian_of(inputs: Tensor) -> InputHessian:
    moment = SecondMoment(inputs.shape[-1])
    for tile in inputs.split(2):
        moment.add(tile)
    return InputHessian.from_moments(InputMoments(calibration=moment, held_out=None))


@pytest.mark.parametrize("part", ["tower", "decoder"])
@pytest.mark.parametrize("outlier", ["none", "channel", "token"])
def test_the_loss_is_that_of_really_rounding(part: Part, outlier: str) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(6, 40, 96, generator=generator)
    if outlier == "channel":
        inputs[..., 5] *= 20
    elif outlier == "token":
        inputs[:, 7] *= 20
    weight = torch.randn(48, 96, generator=generator)
    layout = AffineLayout(bits=8, group_size=96, symmetric=True)
    rounding = input_rounding(layout, 96, part, "onnx")
    assert rounding is not None
    change = (rounding(inputs) - inputs).double() @ weight.double().T
    exact = float(change.square().sum() / (inputs.double() @ weight.double().T).square().sum())
    found = input_loss(DenseWeight(values=weight), hessian_of(inputs), part)
    assert found == pytest.approx(exact, rel=0.15)


def test_a_huge_token_costs_others_where_they_share_a_scale() -> None:
    inputs = torch.randn(4, 40, 96, generator=torch.Generator().manual_seed(0))
    inputs[:, 7] *= 300
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(1))
    steps = hessian_of(inputs).steps
    # The others have steps as before where each has its own.
    assert steps.row < steps.tile
    plain = hessian_of(torch.cat([inputs[:, :7], inputs[:, 8:]], dim=1))
    assert input_loss(DenseWeight(values=weight), plain, "tower") < MOST_LOST


def with_outlier(checkpoint: Checkpoint, factor: float) -> tuple[Checkpoint, set[str]]:
    """One channel before the first feed-forward network, larger by a factor, divided out again."""
    block = checkpoint.spec.tower.blocks[0]
    norm = checkpoint.model.get_submodule(block.ffn.norm)
    with torch.no_grad():
        for name in ("weight", "bias"):
            cast("Tensor", getattr(norm, name))[3] *= factor
    for name in block.ffn.inputs:
        values = checkpoint.form(name).dequantize()
        values[:, 3] /= factor
        checkpoint.set_form(name, DenseWeight(values=values))
    return checkpoint, set(block.ffn.inputs)


def test_a_layer_with_an_outlier_takes_groups_and_says_why(tiny_checkpoint: Checkpoint) -> None:
    checkpoint, hit = with_outlier(tiny_checkpoint, 300.0)
    done = Gptq(rules=(ROWS,)).apply(
        checkpoint, CalibrationSet.from_reference(0, 4), RunContext(threads=1)
    )
    record = done.history[-1]
    for linear, form in done.forms().items():
        if linear.part != "tower":
            continue
        layout = form.layout
        assert isinstance(layout, AffineLayout)
        assert layout.has_byte_rows(linear.in_features) == (linear.name not in hit)
        (row,) = (row for row in record.layers if row["name"] == linear.name)
        assert (row["input_loss"] > MOST_LOST) == (linear.name in hit)
        assert ("inputs in int8" in row["reason"]) == (linear.name in hit)
    for name in hit:
        assert any(name in note and "groups of 32" in note for note in record.notes)


def test_rows_may_be_insisted_on(tiny_checkpoint: Checkpoint) -> None:
    checkpoint, hit = with_outlier(tiny_checkpoint, 300.0)
    stage = Gptq(rules=(ROWS,), outlier_group_size=None)
    assert stage.plan(PlanState.of(checkpoint.spec)).notes == ()
    done = stage.apply(checkpoint, CalibrationSet.from_reference(0, 4), RunContext(threads=1))
    for name in hit:
        layout = done.form(name).layout
        assert isinstance(layout, AffineLayout)
        assert layout.has_byte_rows(done.form(name).shape[1])


def test_a_plan_says_that_some_layers_may_take_groups(tiny_checkpoint: Checkpoint) -> None:
    state = PlanState.of(tiny_checkpoint.spec)
    (note,) = Gptq(rules=(ROWS,)).plan(state).notes
    assert "those whose inputs have outliers" in note
    assert "groups of 32" in note
    # Nothing to say where no layer has rows.
    assert Gptq(rules=(WeightRule(bits=8),)).plan(state).notes == ()


@pytest.mark.parametrize("size", [0, 16, 48, 256])
def test_other_groups_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"outlier_group_size is {size}; allowed are 32, 64, 128"):
        Gptq(rules=(ROWS,), outlier_group_size=size)
