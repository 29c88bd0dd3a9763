"""Each score against a textbook computation in float64 on the full attention matrix."""

from __future__ import annotations

import itertools
from math import isqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.compress.tokens.baseline.random_tokens import random_indices
from pocketvlm.compress.tokens.baseline.uniform_stride import uniform_indices
from pocketvlm.compress.tokens.pool.average_pool import (
    ConstantMeans,
    cell_tokens,
    pooled_grid,
    reachable_counts,
)
from pocketvlm.compress.tokens.pool.thumbnail_sampled import thumbnail_means
from pocketvlm.compress.tokens.rank.cls_attention import ClsAttention
from pocketvlm.compress.tokens.rank.distinct_features import DistinctFeatures
from pocketvlm.compress.tokens.rank.ranking import Ranking, RankingReducer
from pocketvlm.compress.tokens.rank.received_attention import ReceivedAttention
from pocketvlm.graph.token_scores import cls_attention, distinctness, received_attention
from pocketvlm.models.reducer import ReducerInputs


def full_attention(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    logits = np.einsum("bhid,bhjd->bhij", queries.astype(np.float64), keys.astype(np.float64))
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def draw(seed: int, tokens: int, batch: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (batch, 3, tokens, 8)
    return rng.normal(size=shape).astype(np.float32), rng.normal(size=shape).astype(np.float32)


@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_cls_attention_is_the_first_row_without_its_own_column(seed: int, patches: int) -> None:
    queries, keys = draw(seed, patches + 1)
    expected = full_attention(queries, keys).mean(axis=1)[:, 0, 1:]
    found = cls_attention(torch.from_numpy(queries), torch.from_numpy(keys))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-7)
    assert float(found.sum(dim=-1).max()) < 1  # [CLS] keeps a share for itself


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_received_attention_is_the_column_mean_in_any_chunks(
    seed: int, tokens: int, chunk: int
) -> None:
    queries, keys = draw(seed, tokens)
    expected = full_attention(queries, keys).mean(axis=(1, 2))
    found = received_attention(torch.from_numpy(queries), torch.from_numpy(keys), chunk=chunk)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-7)


@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_distinctness_is_the_distance_from_the_mean(seed: int, tokens: int) -> None:
    features = np.random.default_rng(seed).normal(size=(2, tokens, 6)).astype(np.float32)
    expected = np.zeros((2, tokens))
    for image in range(2):
        mean = sum(features[image].astype(np.float64)) / tokens
        for token in range(tokens):
            expected[image, token] = np.linalg.norm(features[image, token] - mean)
    found = distinctness(torch.from_numpy(features))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_the_odd_one_out_is_kept() -> None:
    features = torch.ones(1, 9, 4)
    features[0, 4] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    features[0, 7, 0] = 3
    queries, keys = (torch.zeros(1, 1, 9, 4) for _ in range(2))
    inputs = ReducerInputs(
        features=features, queries=queries, keys=keys, has_cls=False, merge_factor=1, patch_rows=3
    )
    _, indices = chosen(DistinctFeatures(), inputs, 2)
    assert indices.tolist() == [[4, 7]]


def chosen(ranking: Ranking, inputs: ReducerInputs, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    kept, indices = RankingReducer(ranking.score, keep=keep, positions="original")(inputs)
    return kept, indices


def inputs_of(queries: np.ndarray, keys: np.ndarray, *, has_cls: bool, merge: int) -> ReducerInputs:
    patches = queries.shape[2] - has_cls
    features = torch.randn(2, patches // merge**2, 5, generator=torch.Generator().manual_seed(0))
    return ReducerInputs(
        features=features,
        queries=torch.from_numpy(queries),
        keys=torch.from_numpy(keys),
        has_cls=has_cls,
        merge_factor=merge,
        patch_rows=isqrt(patches),
    )


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("has_cls", [True, False])
def test_received_attention_ranks_merged_tokens(has_cls: bool, merge: int) -> None:
    queries, keys = draw(3, 16 + has_cls)
    inputs = inputs_of(queries, keys, has_cls=has_cls, merge=merge)
    received = full_attention(queries, keys).mean(axis=(1, 2))[:, int(has_cls) :]
    cells = 4 // merge
    grid = received.reshape(2, cells, merge, cells, merge).mean(axis=(2, 4)).reshape(2, -1)
    expected = np.sort(np.argsort(-grid, axis=-1)[:, :3], axis=-1)
    kept, indices = chosen(ReceivedAttention(), inputs, 3)
    assert indices.tolist() == expected.tolist()
    for image in range(2):
        assert torch.equal(kept[image], inputs.features[image, indices[image]])


def test_cls_attention_keeps_what_cls_looks_at_and_not_what_patches_look_at() -> None:
    queries, keys = (np.zeros((1, 1, 17, 4), dtype=np.float32) for _ in range(2))
    queries[0, 0, 0, 0] = 5  # [CLS] looks along axis 0, all patches along axis 1
    queries[0, 0, 1:, 1] = 5
    keys[0, 0, [3, 9], 0] = 5
    keys[0, 0, [5, 6], 1] = 5
    inputs = inputs_of(queries, keys, has_cls=True, merge=1)
    by_cls = chosen(ClsAttention(), inputs, 2)[1]
    by_all = chosen(ReceivedAttention(), inputs, 2)[1]
    assert by_cls.tolist() == [[2, 8]]
    assert by_all.tolist() == [[4, 5]]


@given(st.integers(1, 64), st.data())
@settings(max_examples=100, deadline=None)
def test_fixed_subsets_are_ascending_unique_and_whole_at_k_equal_n(
    count: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, count))
    for indices in (uniform_indices(count, keep), random_indices(count, keep, seed=keep)):
        assert len(indices) == keep
        assert all(a < b for a, b in itertools.pairwise(indices))
        assert indices[0] >= 0
        assert indices[-1] < count
    assert uniform_indices(count, count) == tuple(range(count))
    gaps = np.diff((-1, *uniform_indices(count, keep), count))
    assert gaps.max() <= -(-count // keep) + 1


def test_random_subsets_follow_their_seed() -> None:
    assert random_indices(64, 16, seed=1) == random_indices(64, 16, seed=1)
    assert random_indices(64, 16, seed=1) != random_indices(64, 16, seed=2)


@given(st.integers(1, 9), st.integers(1, 9), st.data())
@settings(max_examples=100, deadline=None)
def test_average_pool_is_adaptive_pooling(height: int, width: int, data: st.DataObject) -> None:
    tokens = (height, width)
    keep = data.draw(st.sampled_from(reachable_counts(tokens)))
    grid = pooled_grid(tokens, keep)
    assert grid is not None
    queries, keys = draw(0, height * width)
    inputs = inputs_of(queries, keys, has_cls=False, merge=1)
    means = cell_tokens(tokens, grid)
    pooled, indices = ConstantMeans(means, tokens=height * width, positions="original")(inputs)
    maps = inputs.features.transpose(1, 2).reshape(2, 5, height, width)
    expected = torch.nn.functional.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-6)
    assert indices.shape == (2, keep)
    assert bool((indices[:, 1:] > indices[:, :-1]).all())


def test_a_pooled_grid_has_cells_that_are_square_or_twice_as_high() -> None:
    square = (8, 8)
    assert pooled_grid(square, 64) == (8, 8)
    assert pooled_grid(square, 32) == (4, 8)
    assert pooled_grid(square, 16) == (4, 4)
    assert pooled_grid(square, 7) is None
    assert pooled_grid(square, 10) is None
    assert pooled_grid((4, 4), 15) is None
    assert pooled_grid((6, 12), 18) == (3, 6)
    assert pooled_grid((12, 6), 18) == (6, 3)
    assert pooled_grid((6, 12), 7) is None


QUARTERS = {0: [0, 1, 4, 5], 2: [2, 3, 6, 7], 8: [8, 9, 12, 13], 10: [10, 11, 14, 15]}


@pytest.mark.parametrize(
    ("pooled", "keep", "expected"),
    [
        (0, 4, {2: [2], 6: [6], 10: [10], 14: [14]}),
        (1, 3, {3: [3], 5: list(range(16)), 12: [12]}),
        (4, 6, {**QUARTERS, 5: [5], 13: [13]}),
    ],
)
def test_a_thumbnail_is_means_and_samples_of_what_is_no_centre(
    pooled: int, keep: int, expected: dict[int, list[int]]
) -> None:
    means = thumbnail_means((4, 4), pooled=pooled, keep=keep)
    assert means == expected
    assert list(means) == sorted(means)
