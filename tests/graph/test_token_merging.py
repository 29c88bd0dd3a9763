"""Merging tokens: each rule against a loop in float64, and what holds of every merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from pocketvlm.graph.token_merging import (
    TowerTokens,
    join_important,
    join_neighbours,
    join_similar,
    merge_tokens,
)


def randoms(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def similar_by_loops(metric: np.ndarray, count: int, worth: np.ndarray) -> list[int]:
    """ToMe's matching of one picture as section 3 of the paper tells it."""
    total = len(metric)
    unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    evens, odds = list(range(0, total, 2)), list(range(1, total, 2))
    edges = []
    for even in evens:
        likeness = [float(unit[even] @ unit[odd]) for odd in odds]
        best = int(np.argmax(likeness))
        edges.append((likeness[best] - worth[even], even, best))
    leaving = sorted(edges, key=lambda edge: -edge[0])[: total - count]
    target = {odd: number for number, odd in enumerate(odds)}
    target |= {even: best for _, even, best in leaving}
    staying = [even for even in evens if even not in target]
    target |= {even: len(odds) + number for number, even in enumerate(staying)}
    return [target[token] for token in range(total)]


@given(st.integers(0, 2**31), st.integers(3, 17), st.data())
@settings(max_examples=60, deadline=None)
def test_similar_tokens_are_matched_as_in_the_paper(
    seed: int, total: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(total // 2, total - 1))
    metric, worth = randoms(seed, 2, total, 5), randoms(seed + 1, 2, total).abs()
    for given_worth in (None, worth):
        found = join_similar(metric, count, given_worth)
        for picture in range(2):
            against = np.zeros(total) if given_worth is None else worth[picture].double().numpy()
            expected = similar_by_loops(metric[picture].double().numpy(), count, against)
            assert found[picture].tolist() == expected


@given(st.integers(0, 2**31), st.integers(2, 17), st.data())
@settings(max_examples=60, deadline=None)
def test_all_but_the_important_tokens_become_one(
    seed: int, total: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, total - 1))
    score = randoms(seed, 2, total)
    found = join_important(score, count)
    for picture in range(2):
        kept = sorted(np.argsort(-score[picture].numpy())[: count - 1].tolist())
        expected = [kept.index(token) if token in kept else count - 1 for token in range(total)]
        assert found[picture].tolist() == expected


@pytest.mark.parametrize(("high", "wide"), [(1, 2), (2, 2), (2, 4)])
def test_neighbours_are_rectangles_of_the_grid(high: int, wide: int) -> None:
    rows, columns = 4, 8
    values = randoms(0, 1, rows * columns, 3)
    target = join_neighbours(rows, columns, high, wide)
    count = rows * columns // (high * wide)
    merged, _ = merge_tokens(values, target, count)
    grid = values.transpose(1, 2).view(1, 3, rows, columns)
    expected = functional.avg_pool2d(grid, (high, wide)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(merged, expected)


@given(st.integers(0, 2**31), st.integers(2, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_a_token_is_the_mean_of_the_patches_that_it_stands_for(
    seed: int, total: int, data: st.DataObject
) -> None:
    """Two merges in a row, against the patches themselves."""
    first = data.draw(st.integers(1, total))
    second = data.draw(st.integers(1, first))
    rng = np.random.default_rng(seed)

    def targets(tokens: int, count: int) -> torch.Tensor:
        every = np.concatenate([np.arange(count), rng.integers(0, count, tokens - count)])
        return torch.from_numpy(rng.permutation(every))[None]

    values = randoms(seed, 1, total, 4)
    once, tokens = merge_tokens(values, targets(total, first), first)
    twice, tokens = merge_tokens(once, targets(first, second), second, tokens)
    assert twice.shape == (1, second, 4)
    assert int(tokens.sizes.sum()) == total
    for place in range(second):
        members = (tokens.places[0] == place).nonzero().flatten()
        assert len(members) == int(tokens.sizes[0, place, 0])
        mean = values[0, members].double().mean(dim=0)
        torch.testing.assert_close(twice[0, place].double(), mean, rtol=1e-4, atol=1e-5)
    restored = tokens.restore(twice)
    assert restored.shape == values.shape
    torch.testing.assert_close(restored.mean(dim=1), values.mean(dim=1), rtol=1e-4, atol=1e-5)


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_alike_tokens_lose_less_than_tokens_by_chance(seed: int) -> None:
    """On features of a few kinds, which is what background is."""
    rng = np.random.default_rng(seed)
    kinds = rng.normal(size=(4, 8))
    values = torch.from_numpy(
        kinds[rng.integers(0, 4, 24)] + rng.normal(scale=0.05, size=(24, 8))
    ).to(torch.float32)[None]

    def loss(target: torch.Tensor) -> float:
        merged, tokens = merge_tokens(values, target, 12)
        return float((tokens.restore(merged) - values).square().sum())

    pairs = torch.from_numpy(rng.permutation(np.repeat(np.arange(12), 2)))[None]
    assert loss(join_similar(values, 12)) < loss(pairs)


def test_equal_tokens_are_merged_without_loss() -> None:
    values = randoms(3, 1, 5, 6).repeat_interleave(2, dim=1)
    merged, tokens = merge_tokens(values, join_similar(values, 5), 5)
    torch.testing.assert_close(tokens.restore(merged), values)


def test_what_a_token_stands_for_is_restored_in_its_place() -> None:
    tokens = TowerTokens(sizes=torch.ones(1, 2, 1), places=torch.tensor([[1, 0, 1]]))
    states = torch.tensor([[[1.0], [2.0]]])
    assert tokens.restore(states).flatten().tolist() == [2, 1, 2]
