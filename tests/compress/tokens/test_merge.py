"""Merging against loops in float64; what is merged is neither lost nor counted twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.compress.tokens.merge.bipartite import MergedTokens, merge_similar, merge_to
from pocketvlm.compress.tokens.merge.dominant_merged import DominantMergedReducer
from pocketvlm.compress.tokens.merge.similar import SimilarReducer
from pocketvlm.graph.selection import top_indices
from pocketvlm.graph.token_scores import cls_attention
from tests.compress.tokens.test_diverse import cosines, inputs_of


def merge_by_hand(
    features: np.ndarray, worth: np.ndarray, keep: int
) -> list[tuple[int, frozenset[int]]]:
    """Each remaining token's place, and all tokens that it stands for."""
    groups = [(place, frozenset([place])) for place in range(len(features))]

    def mean(group: frozenset[int], values: np.ndarray) -> np.ndarray:
        return values[sorted(group)].mean(axis=0)

    while len(groups) > keep:
        similarity = cosines(np.stack([mean(group, features) for _, group in groups]))
        even, odd = list(range(0, len(groups), 2)), list(range(1, len(groups), 2))
        partner = {place: max(odd, key=lambda o: similarity[place, o]) for place in even}
        price = {p: mean(groups[p][1], worth) - similarity[p, partner[p]] for p in even}
        count = min(len(groups) - keep, max(1, len(groups) // 4))
        gone = sorted(even, key=lambda place: price[place])[:count]
        merged = dict(enumerate(groups))
        for place in gone:
            name, group = merged[partner[place]]
            merged[partner[place]] = (name, group | groups[place][1])
        groups = [merged[place] for place in range(len(groups)) if place not in gone]
    return groups


@given(st.integers(0, 2**32 - 1), st.integers(1, 18), st.booleans(), st.data())
@settings(max_examples=80, deadline=None)
def test_merging_is_that_of_the_paper(
    seed: int, count: int, weighs: bool, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, count))
    rng = np.random.default_rng(seed)
    features, worth = rng.normal(size=(count, 5)), rng.random(count) * weighs
    expected = merge_by_hand(features, worth, keep)
    start = MergedTokens.unmerged(torch.from_numpy(features)[None], torch.from_numpy(worth)[None])
    found = merge_to(start, keep)
    assert found.indices[0].tolist() == [place for place, _ in expected]
    assert found.sizes[0, :, 0].tolist() == [len(group) for _, group in expected]
    means = np.stack([features[sorted(group)].mean(axis=0) for _, group in expected])
    np.testing.assert_allclose(found.features[0].numpy(), means, rtol=1e-9, atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.data())
@settings(max_examples=50, deadline=None)
def test_nothing_is_lost(seed: int, count: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, count))
    features = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, count, 4)))
    found = merge_to(MergedTokens.unmerged(features), keep)
    assert found.features.shape == (2, keep, 4)
    torch.testing.assert_close(found.sizes.sum(dim=1), torch.full((2, 1), float(count)).double())
    total = (found.features * found.sizes).sum(dim=1)
    torch.testing.assert_close(total, features.sum(dim=1))
    assert bool((found.indices.diff(dim=1) > 0).all())


def test_equal_tokens_are_merged_before_others() -> None:
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(1, 8, 16)))
    features[0, 4] = features[0, 1]
    found = merge_similar(MergedTokens.unmerged(features), 7)
    assert found.indices[0].tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert found.sizes[0, 1, 0] == 2


def test_turbo_spares_what_the_tower_attends_to() -> None:
    inputs = inputs_of(0, 16)
    attention = cls_attention(inputs.queries, inputs.keys)
    plain = SimilarReducer(semantic_weight=0, keep=12, positions="original")(inputs)[1]
    kept = SimilarReducer(semantic_weight=50, keep=12, positions="original")(inputs)[1]
    assert not torch.equal(kept, plain)
    for image in range(2):
        even = attention[image, ::2]
        alone = {index for index in kept[image].tolist() if index % 2 == 0}
        assert alone == {2 * int(place) for place in even.topk(4).indices}


def test_what_is_alike_is_merged_before_what_is_not_down_to_a_few() -> None:
    """One object on a plain background, at an even place, is still itself among four tokens."""
    features = torch.tensor([1.0, 0.0]).repeat(1, 40, 1)
    features[0, 6] = torch.tensor([0.0, 1.0])
    found = merge_to(MergedTokens.unmerged(features), 4)
    alone = found.indices[0].tolist().index(6)
    assert found.sizes[0, alone, 0] == 1
    assert torch.equal(found.features[0, alone], features[0, 6])


@pytest.mark.parametrize("merged", [1, 3, 5])
def test_visionzip_merges_each_other_token_into_the_target_of_the_nearest_key(merged: int) -> None:
    inputs = inputs_of(7, 16)
    keep = 6
    reducer = DominantMergedReducer(tokens=16, merged=merged, keep=keep, positions="original")
    found, indices = reducer(inputs)
    attention = cls_attention(inputs.queries, inputs.keys)
    dominant = top_indices(attention, keep - merged)
    keys = inputs.keys.mean(dim=1)[:, 1:].double().numpy()
    for image in range(2):
        features = inputs.features[image].double().numpy()
        top = dominant[image].tolist()
        rest = [token for token in range(16) if token not in top]
        targets = [rest[(2 * n + 1) * len(rest) // (2 * merged)] for n in range(merged)]
        similarity = cosines(keys[image])
        nearest = {t: max(targets, key=lambda o: similarity[t, o]) for t in rest}
        expected = {token: features[token] for token in top}
        for target in targets:
            group = [token for token in rest if nearest[token] == target]
            assert target in group
            expected[target] = features[group].mean(axis=0)
        assert indices[image].tolist() == sorted(expected)
        rows = np.stack([expected[token] for token in sorted(expected)])
        np.testing.assert_allclose(found[image].numpy(), rows, rtol=1e-5, atol=1e-6)


def test_all_tokens_are_kept_as_they_are() -> None:
    inputs = inputs_of(1, 16)
    for reducer in (
        SimilarReducer(semantic_weight=1, keep=16, positions="original"),
        DominantMergedReducer(tokens=16, merged=0, keep=16, positions="original"),
    ):
        kept, indices = reducer(inputs)
        assert torch.equal(kept, inputs.features)
        assert indices[0].tolist() == list(range(16))
