"""Folds against the stock arithmetic that they replace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from pocketvlm.checkpoint.folding import apply_fold, folded_tensors
from pocketvlm.errors import CheckpointError
from pocketvlm.models.folds import (
    AddOne,
    Multiply,
    PatchKernel,
    ResizeTable,
    ScaleRows,
    SplitRows,
    SumFrames,
    Transpose,
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_layer_scale_goes_into_the_linear_before_it():
    linear, scale, inputs = nn.Linear(6, 4), torch.randn(4), torch.randn(3, 6)
    weight, bias = (
        apply_fold(ScaleRows(target="w", scale="s"), [part.detach(), scale])[0]
        for part in (linear.weight, linear.bias)
    )
    folded = functional.linear(inputs, weight, bias)
    torch.testing.assert_close(folded, linear(inputs) * scale)


def test_a_fused_linear_comes_apart_in_its_own_type():
    fused, inputs = torch.randn(9, 5, dtype=torch.bfloat16), torch.randn(2, 5).bfloat16()
    parts = apply_fold(SplitRows(source="qkv", targets=("q", "k", "v"), sizes=(5, 2, 2)), [fused])
    assert [part.dtype for part in parts] == [torch.bfloat16] * 3
    joined = torch.cat([inputs @ part.T for part in parts], dim=-1)
    assert torch.equal(joined, inputs @ fused.T)


def test_a_norm_of_one_plus_w_and_a_constant():
    weight = torch.randn(5).bfloat16()
    assert torch.equal(apply_fold(AddOne(target="n"), [weight])[0], 1.0 + weight.float())
    assert torch.equal(
        apply_fold(Multiply(target="n", factor=3.0), [weight])[0], 3 * weight.float()
    )


def test_a_kernel_over_equal_frames_is_one_over_a_picture():
    picture = torch.randn(1, 3, 8, 12)
    frames = nn.Conv3d(3, 4, (2, 4, 4), stride=(2, 4, 4), bias=False)
    (kernel,) = apply_fold(SumFrames(target="k"), [frames.weight.detach()])
    expected = frames(torch.stack([picture, picture], dim=2))[:, :, 0]
    torch.testing.assert_close(functional.conv2d(picture, kernel, stride=4), expected)


def test_a_linear_over_flattened_patches_is_a_convolution():
    picture, linear = torch.randn(1, 3, 8, 12), nn.Linear(4 * 4 * 3, 5, bias=False)
    fold = PatchKernel(target="p", channels=3, size=4)
    (kernel,) = apply_fold(fold, [linear.weight.detach()])
    patches = picture.view(1, 3, 2, 4, 3, 4).permute(0, 2, 4, 3, 5, 1).reshape(6, -1)
    found = functional.conv2d(picture, kernel, stride=4).flatten(2)[0].T
    torch.testing.assert_close(found, linear(patches))


def test_a_bare_matrix_is_the_weight_of_a_linear():
    matrix, inputs = torch.randn(4, 6), torch.randn(2, 4)
    (weight,) = apply_fold(Transpose(source="m", target="l.weight"), [matrix])
    torch.testing.assert_close(functional.linear(inputs, weight), inputs @ matrix)


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (4, 4), (3, 9), (16, 5), (1, 1), (7, 40)])
def test_a_table_of_positions_is_resampled_as_torch_resamples_pictures(rows, columns):
    table = torch.randn(16, 5)
    (found,) = apply_fold(ResizeTable(target="t", rows=rows, columns=columns), [table])
    expected = functional.interpolate(
        table.T.view(1, 5, 4, 4),
        (rows, columns),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    torch.testing.assert_close(found, expected[0].flatten(1).T)


def test_a_table_of_another_shape_than_a_square_is_refused():
    fold = ResizeTable(target="t", rows=2, columns=2)
    with pytest.raises(CheckpointError, match="its rows do not form a square"):
        apply_fold(fold, [torch.zeros(15, 3)])


def test_a_source_is_read_once_for_all_that_is_made_of_it():
    read = []

    def take(name):
        read.append(name)
        return torch.arange(6.0)

    made = folded_tensors((SplitRows(source="f", targets=("a", "b"), sizes=(4, 2)),), take)
    assert made("else") is None
    assert made("b").tolist() == [4, 5]
    assert made("a").tolist() == [0, 1, 2, 3]
    assert read == ["f"]


def test_a_shape_that_does_not_fit_is_one_line():
    fold = SplitRows(source="f", targets=("a", "b"), sizes=(4, 3))
    with pytest.raises(CheckpointError, match=r"tensor f is \(6,\), which cannot be folded"):
        apply_fold(fold, [torch.zeros(6)])
