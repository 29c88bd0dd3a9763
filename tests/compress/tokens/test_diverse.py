"""Diversity against greedy loops in float64, and what each method must never lose."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.compress.tokens.diverse.determinantal import likeliest_tokens, scaled
from pocketvlm.compress.tokens.diverse.important_diverse import (
    ImportantDiverseReducer,
    drop_duplicates,
)
from pocketvlm.compress.tokens.diverse.max_min import farthest_tokens
from pocketvlm.compress.tokens.rank.attention_rows import AttentionRowsReducer
from pocketvlm.graph.selection import split_indices, top_indices
from pocketvlm.graph.token_scores import cls_attention
from pocketvlm.models.reducer import ReducerInputs


def cosines(features: np.ndarray) -> np.ndarray:
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    product = unit @ unit.T
    return (product + product.T) / 2


def inputs_of(seed: int, patches: int = 16, *, has_cls: bool = True) -> ReducerInputs:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: torch.from_numpy(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    tokens = patches + has_cls
    return ReducerInputs(
        features=draw(2, patches, 6),
        queries=draw(2, 3, tokens, 4),
        keys=draw(2, 3, tokens, 4),
        has_cls=has_cls,
        merge_factor=1,
        patch_rows=4,
    )


@given(st.integers(0, 2**32 - 1), st.integers(2, 14), st.data())
@settings(max_examples=60, deadline=None)
def test_the_greedy_choice_is_that_of_the_paper(seed: int, count: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, count))
    features = np.random.default_rng(seed).normal(size=(count, 5))
    distance = 1 - cosines(features)
    others = distance + np.diag(np.full(count, np.inf))
    chosen = [int(others.min(axis=1).argmax())]
    while len(chosen) < keep:
        nearest = distance[:, chosen].min(axis=1)
        nearest[chosen] = -np.inf
        chosen.append(int(nearest.argmax()))
    found = farthest_tokens(torch.from_numpy(features)[None], keep)
    assert found[0].tolist() == chosen


@pytest.mark.parametrize("seed", range(5))
def test_max_min_spreads_wider_than_the_first_tokens_and_than_chance(seed: int) -> None:
    features = np.random.default_rng(seed).normal(size=(40, 8))

    def closest(indices: list[int]) -> float:
        pairs = itertools.combinations(indices, 2)
        return min(1 - cosines(features)[a, b] for a, b in pairs)

    chosen = farthest_tokens(torch.from_numpy(features)[None], 8)[0].tolist()
    randoms = [
        closest(np.random.default_rng(other).permutation(40)[:8].tolist()) for other in range(20)
    ]
    assert closest(chosen) > max(randoms)


@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_determinantal_is_the_greedy_solution(
    seed: int, count: int, is_relevant: bool, data: st.DataObject
) -> None:
    """Each step adds the token whose kernel with those chosen has the largest determinant."""
    keep = data.draw(st.integers(1, count))
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, 16))
    relevance = rng.uniform(0.2, 1, size=count) if is_relevant else np.ones(count)
    kernel = relevance[:, None] * cosines(features) * relevance
    np.fill_diagonal(kernel, relevance**2)
    chosen: list[int] = []
    for _ in range(keep):
        rest = [token for token in range(count) if token not in chosen]
        volumes = [np.linalg.det(kernel[np.ix_([*chosen, t], [*chosen, t])]) for t in rest]
        # Rounding decides between equals, such as the first of tokens that are all relevant.
        best = max(volumes)
        chosen.append(next(t for t, v in zip(rest, volumes, strict=True) if v >= best - 1e-12))
    found = likeliest_tokens(
        torch.from_numpy(features)[None], torch.from_numpy(relevance)[None], keep
    )
    assert found[0].tolist() == chosen


@pytest.mark.parametrize("seed", range(5))
def test_determinantal_spans_more_than_the_most_relevant_tokens_and_than_chance(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features, relevance = rng.normal(size=(40, 12)), rng.uniform(0.1, 1, size=40)
    kernel = relevance[:, None] * cosines(features) * relevance

    def volume(indices: list[int]) -> float:
        return float(np.linalg.slogdet(kernel[np.ix_(indices, indices)])[1])

    both = torch.from_numpy(features)[None], torch.from_numpy(relevance)[None]
    chosen = likeliest_tokens(*both, 8)[0].tolist()
    top = np.argsort(-relevance)[:8].tolist()
    randoms = [np.random.default_rng(other).permutation(40)[:8].tolist() for other in range(20)]
    assert volume(chosen) > max(map(volume, [top, *randoms]))


def test_determinantal_keeps_every_token_once_where_they_span_nothing_new() -> None:
    """More tokens than channels, doubles, and tokens of no relevance: the rest in some order."""
    features = torch.ones(1, 6, 2)
    features[:, 3:, 1] = -1
    relevance = torch.tensor([[1.0, 0.0, 0.5, 0.0, 1.0, 0.5]])
    assert sorted(likeliest_tokens(features, relevance, 6)[0].tolist()) == list(range(6))
    assert sorted(likeliest_tokens(features, relevance, 2)[0].tolist()) == [0, 4]


def test_scaled_scores_are_between_0_and_1() -> None:
    scores = torch.tensor([[2.0, 6.0, 4.0], [3.0, 3.0, 3.0]])
    torch.testing.assert_close(scaled(scores), torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]))


def test_of_equal_tokens_one_remains() -> None:
    rng = np.random.default_rng(1)
    distinct = rng.normal(size=(4, 6))
    features = torch.from_numpy(distinct[[0, 0, 1, 1, 2, 2, 3, 3]])[None]
    names = torch.arange(8)[None]
    assert {index // 2 for index in drop_duplicates(features, names, 4)[0].tolist()} == {0, 1, 2, 3}
    assert {index // 2 for index in farthest_tokens(features, 4)[0].tolist()} == {0, 1, 2, 3}
    relevance = torch.ones(1, 8, dtype=features.dtype)
    likeliest = likeliest_tokens(features, relevance, 4)[0].tolist()
    assert {index // 2 for index in likeliest} == {0, 1, 2, 3}


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.data())
@settings(max_examples=60, deadline=None)
def test_a_step_removes_the_even_tokens_that_are_most_like_an_odd_one(
    seed: int, count: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, count))
    features = np.random.default_rng(seed).normal(size=(count, 5))
    left = list(range(count))
    while len(left) > keep:
        similarity = cosines(features[left])
        even, odd = range(0, len(left), 2), range(1, len(left), 2)
        closest = {place: max(similarity[place, other] for other in odd) for place in even}
        most = min(len(left) - keep, max(1, len(left) // 4))
        goes = sorted(even, key=lambda place: -closest[place])[:most]
        left = [name for place, name in enumerate(left) if place not in goes]
    found = drop_duplicates(torch.from_numpy(features)[None], torch.arange(count)[None], keep)
    assert found[0].tolist() == left


@pytest.mark.parametrize("place", [0, 6, 17])
def test_a_token_that_is_like_no_other_stays_among_many_alike(place: int) -> None:
    features = torch.tensor([1.0, 0.0]).repeat(1, 40, 1)
    features[0, place] = torch.tensor([0.0, 1.0])
    assert place in drop_duplicates(features, torch.arange(40)[None], 4)[0].tolist()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_most_important_tokens_are_always_kept(share: float) -> None:
    inputs = inputs_of(3)
    important = max(1, round(share * 6))
    reducer = ImportantDiverseReducer(important=important, keep=6, positions="original")
    kept, indices = reducer(inputs)
    top = top_indices(cls_attention(inputs.queries, inputs.keys), important)
    for image in range(2):
        assert set(top[image].tolist()) <= set(indices[image].tolist())
        assert torch.equal(kept[image], inputs.features[image, indices[image]])


def test_rows_of_most_attention_are_kept_whole() -> None:
    inputs = inputs_of(4)
    attention = cls_attention(inputs.queries, inputs.keys).double().numpy().reshape(2, 4, 4)
    _, indices = AttentionRowsReducer(columns=4, keep=8, positions="original")(inputs)
    for image in range(2):
        rows = sorted(np.argsort(-attention[image].sum(axis=1))[:2])
        assert indices[image].tolist() == [4 * row + column for row in rows for column in range(4)]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=30), st.data())
@settings(max_examples=100, deadline=None)
def test_the_rest_is_the_complement_also_among_ties(values: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, len(values) - 1))
    scores = torch.tensor(values, dtype=torch.float32)[None]
    kept, rest = split_indices(scores, keep)
    assert torch.equal(kept, top_indices(scores, keep))
    assert sorted(kept[0].tolist() + rest[0].tolist()) == list(range(len(values)))
    assert rest[0].tolist() == sorted(rest[0].tolist())
