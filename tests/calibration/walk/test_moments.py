"""Second moments, token weights and the store of activations."""

from __future__ import annotations

import pytest
import torch

from pocketvlm.calibration.data.modality import TokenCounts, check_weighting, token_weights
from pocketvlm.calibration.walk.activations import ActivationStore
from pocketvlm.calibration.walk.moments import SecondMoment
from pocketvlm.errors import CalibrationError


def test_the_second_moment_is_a_weighted_mean():
    inputs = torch.randn(3, 50, 12)
    weights = torch.rand(3, 50)
    moment = SecondMoment(12)
    for batch, shares in zip(inputs, weights, strict=True):
        moment.add(batch, shares)
    X, w = inputs.reshape(-1, 12).double(), weights.reshape(-1).double()
    expected = (X * w[:, None]).T @ X / w.sum()
    torch.testing.assert_close(moment.blocks()[0], expected, rtol=1e-5, atol=1e-7)
    mean = (X * w[:, None]).sum(0) / w.sum()
    torch.testing.assert_close(moment.mean(), mean, rtol=1e-5, atol=1e-6)
    assert moment.tokens == 150
    assert moment.total_weight == pytest.approx(float(w.sum()))


def test_it_depends_neither_on_batches_nor_on_repetition():
    inputs = torch.randn(64, 8)
    whole, pieces = SecondMoment(8), SecondMoment(8)
    whole.add(inputs)
    for _ in range(3):
        for piece in inputs.split(5):
            pieces.add(piece)
    torch.testing.assert_close(whole.blocks()[0], pieces.blocks()[0], rtol=1e-5, atol=1e-7)


def test_diagonal_blocks_are_those_of_the_full_matrix():
    inputs = torch.randn(40, 10)
    full, cut = SecondMoment(10), SecondMoment(10, block=4)
    full.add(inputs)
    cut.add(inputs)
    (matrix,) = full.blocks()
    assert cut.slices == (slice(0, 4), slice(4, 8), slice(8, 10))
    for part, block in zip(cut.slices, cut.blocks(), strict=True):
        torch.testing.assert_close(block, matrix[part, part], rtol=1e-5, atol=1e-7)


def test_nothing_seen_and_values_that_are_not_finite_are_errors():
    moment = SecondMoment(4)
    with pytest.raises(CalibrationError, match="no calibration token"):
        moment.blocks()
    with pytest.raises(CalibrationError, match="no calibration token"):
        moment.mean()
    moment.add(torch.ones(3, 4), torch.zeros(3))
    with pytest.raises(CalibrationError, match="no calibration token"):
        moment.blocks()
    with pytest.raises(CalibrationError, match="not finite"):
        moment.add(torch.tensor([[1.0, float("nan"), 0.0, 0.0]]))


def test_weightings():
    counts = TokenCounts(visual=300, text=100)
    flags = torch.tensor([[True, True, False]])
    assert counts.ratio == 3
    assert token_weights("uniform", counts, flags) is None
    balanced = token_weights("balanced", counts, flags)
    assert balanced.tolist() == [pytest.approx([1 / 3, 1 / 3, 1.0])]
    # Both modalities weigh the same in total.
    assert counts.visual * float(balanced[0, 0]) == pytest.approx(
        counts.text * float(balanced[0, 2])
    )
    assert token_weights(0.25, counts, flags).tolist() == [[0.25, 0.25, 1.0]]
    assert token_weights("balanced", TokenCounts(visual=0, text=5), ~flags).max() == 1
    for bad in ("equal", -1.0, float("inf")):
        with pytest.raises(ValueError, match="modality_weights"):
            check_weighting(bad)


def test_modality_alone_does_not_decide_a_gradient_weight():
    check_weighting("gradient")
    with pytest.raises(ValueError, match="TokenImportance"):
        token_weights("gradient", TokenCounts(visual=3, text=1), torch.tensor([[True]]))


@pytest.mark.parametrize("budget", [0, 1000, 10**9])
def test_the_store_keeps_every_digit_wherever_it_keeps_it(tmp_path, budget):
    batches = [torch.randn(2, n, 7) for n in (3, 20, 5)]
    with ActivationStore(tmp_path, budget) as store:
        for batch in batches:
            store.append(batch)
        copy = store.copy()
        store[1] = batches[1] * 2
        assert len(store) == 3
        assert torch.equal(store[1], batches[1] * 2)
        assert torch.equal(store[0], batches[0])
        assert all(torch.equal(a, b) for a, b in zip(copy, batches, strict=True))
        copy.close()
        # The file has no name: a killed run leaves nothing.
        assert not list(tmp_path.iterdir())
