"""Top-k in raster order, against argsort; pooling over merge cells, against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.compress.tokens.rank.ranking import pool_merge_cells
from pocketvlm.graph.selection import gather_tokens, top_indices
from pocketvlm.graph.tensor_ops import merge_patches


@st.composite
def scores_and_keep(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    count = draw(st.integers(1, 40))
    # Few distinct values, so that most examples have ties at the border of what is kept.
    values = draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    return np.asarray(values, dtype=np.float32) / 7, draw(st.integers(1, count))


@given(scores_and_keep())
@settings(max_examples=200, deadline=None)
def test_top_indices_are_those_of_a_stable_argsort(case: tuple[np.ndarray, int]) -> None:
    scores, keep = case
    expected = np.sort(np.argsort(-scores.astype(np.float64), kind="stable")[:keep])
    found = top_indices(torch.from_numpy(scores)[None], keep)
    assert found.dtype == torch.int64
    assert found[0].tolist() == expected.tolist()


def test_rows_of_a_batch_are_ranked_on_their_own() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.6]])
    assert top_indices(scores, 2).tolist() == [[1, 2], [0, 2]]


@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_permuting_tokens_permutes_what_is_kept(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permutation(count).astype(np.float32)  # no ties: those go by place on purpose
    order = rng.permutation(count)
    keep = int(rng.integers(1, count + 1))
    kept = set(top_indices(torch.from_numpy(scores)[None], keep)[0].tolist())
    permuted = top_indices(torch.from_numpy(scores[order])[None], keep)[0].tolist()
    assert {int(order[index]) for index in permuted} == kept


def test_gather_takes_whole_features() -> None:
    features = torch.arange(2 * 5 * 3, dtype=torch.float32).view(2, 5, 3)
    indices = torch.tensor([[0, 4], [1, 2]])
    taken = gather_tokens(features, indices)
    assert torch.equal(taken[0], features[0, [0, 4]])
    assert torch.equal(taken[1], features[1, [1, 2]])


@pytest.mark.parametrize(("side", "factor"), [(4, 1), (4, 2), (6, 3), (8, 4)])
def test_pooled_scores_follow_the_merge(side: int, factor: int) -> None:
    scores = np.random.default_rng(0).random((2, side, side))
    cells = side // factor
    expected = np.zeros((2, cells * cells))
    for row in range(cells):
        for column in range(cells):
            block = scores[
                :, row * factor : (row + 1) * factor, column * factor : (column + 1) * factor
            ]
            expected[:, row * cells + column] = block.mean(axis=(1, 2))
    pooled = pool_merge_cells(torch.from_numpy(scores.reshape(2, -1)), factor, side)
    np.testing.assert_allclose(pooled.numpy(), expected, rtol=1e-12)
    # A token and its score come from the same patches.
    merged = merge_patches(torch.from_numpy(scores.reshape(2, -1, 1)), factor, side)
    np.testing.assert_allclose(merged.numpy().mean(-1), expected, rtol=1e-12)
