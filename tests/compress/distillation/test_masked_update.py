"""Masked updates: gradients, exact zeros, and what is stored."""

from __future__ import annotations

import pytest
import torch

from pocketvlm.compress.distillation.masked_update import MaskedUpdate, low_rank_update
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.sparse import SparseWeight


def _weight(dtype: torch.dtype = torch.bfloat16) -> DenseWeight:
    generator = torch.Generator().manual_seed(0)
    return DenseWeight(values=torch.randn(24, 40, generator=generator).to(dtype))


def _mask() -> torch.Tensor:
    return torch.rand(24, 40, generator=torch.Generator().manual_seed(1)) > 0.6


def _forms() -> list[WeightForm]:
    return [
        _weight(),
        _weight(torch.float16),
        _weight(torch.float32),
        SparseWeight.from_form(_weight(), _mask()),
    ]


def _moved(form: WeightForm, rank: int | None) -> MaskedUpdate:
    update = MaskedUpdate(form, rank, torch.Generator().manual_seed(2))
    with torch.no_grad():
        for factor in update.factors.values():
            factor.add_(0.1 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(3)))
    return update


def test_gradients_of_the_masked_product() -> None:
    generator = torch.Generator().manual_seed(4)
    down = torch.randn(3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    up = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    keeps = torch.rand(5, 7, generator=generator) > 0.5
    assert torch.autograd.gradcheck(lambda a, b: low_rank_update(a, b, keeps), (down, up))
    # By hand, G being the update's gradient: dA = B^T (M G) / sqrt(r), dB = (M G) A^T / sqrt(r).
    outer = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(low_rank_update(down, up, keeps), (down, up), outer)
    masked = (outer * keeps) / 3**0.5
    torch.testing.assert_close(found[0], up.detach().T @ masked)
    torch.testing.assert_close(found[1], masked @ down.detach().T)


@pytest.mark.parametrize("rank", [4, None])
@pytest.mark.parametrize("index", range(4))
def test_training_starts_at_the_weight_itself(index: int, rank: int | None) -> None:
    form = _forms()[index]
    update = MaskedUpdate(form, rank, torch.Generator().manual_seed(0))
    assert torch.equal(update.weight(), form.dequantize())
    assert torch.equal(update.merged().dequantize(), form.dequantize())


@pytest.mark.parametrize("rank", [4, None])
@pytest.mark.parametrize("index", range(4))
def test_what_is_merged_is_the_updated_weight_in_its_own_type(index: int, rank: int | None) -> None:
    form = _forms()[index]
    update = _moved(form, rank)
    merged = update.merged()
    assert type(merged) is type(form)
    if isinstance(form, DenseWeight):
        assert isinstance(merged, DenseWeight)
        assert merged.values.dtype == form.values.dtype
        expected = update.weight().detach().to(form.values.dtype).to(torch.float32)
    else:
        assert isinstance(form, SparseWeight)
        assert isinstance(merged, SparseWeight)
        assert torch.equal(merged.mask, form.mask)
        assert merged.stored_bytes == form.stored_bytes
        expected = update.weight().detach().to(torch.float16).to(torch.float32)
    assert torch.equal(merged.dequantize(), expected)
    assert not torch.equal(expected, form.dequantize())


@pytest.mark.parametrize("rank", [4, None])
def test_masked_elements_have_neither_value_nor_gradient(rank: int | None) -> None:
    mask = _mask()
    update = _moved(SparseWeight.from_form(_weight(), mask), rank)
    assert not bool(update.weight()[~mask].any())
    grads = torch.autograd.grad(
        update.weight()[~mask].sum(), list(update.factors.values()), allow_unused=True
    )
    assert not any(bool(grad.any()) for grad in grads if grad is not None)


def test_a_rank_that_saves_nothing_becomes_a_whole_matrix() -> None:
    generator = torch.Generator()
    assert MaskedUpdate(_weight(), 14, generator).rank == 14
    update = MaskedUpdate(_weight(), 15, generator)  # 15 * (24 + 40) = 24 * 40
    assert update.rank is None
    assert update.factors["update"].shape == (24, 40)


def test_integers_are_no_float_weight() -> None:
    affine = AffineWeight.from_codes(
        torch.zeros(4, 32, dtype=torch.uint8),
        scales=torch.ones(4, 1, dtype=torch.float16),
        zeros=None,
        bits=4,
        group_size=32,
        in_features=32,
    )
    with pytest.raises(TypeError, match="not stored as floats"):
        MaskedUpdate(affine, 4, torch.Generator())
