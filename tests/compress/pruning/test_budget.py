"""Budgets in whole numbers: exact, inside their bounds, and those of water filling."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.compress.pruning.budget import allocate_budget, spread_evenly

SCORES = st.one_of(
    st.just(0.0), st.integers(1, 9).map(float), st.floats(1e-300, 1e300, allow_subnormal=False)
)
GROUPS = st.lists(st.tuples(SCORES, st.integers(1, 2_000_000)), min_size=1, max_size=8)
LIMITS = st.fractions(0, 1, max_denominator=20)


def floors_of(sizes, limit):
    return [math.ceil(size * (1 - limit)) for size in sizes]


@st.composite
def problems(draw):
    groups = draw(GROUPS)
    limit = draw(LIMITS)
    sizes = [size for _, size in groups]
    kept = draw(st.integers(sum(floors_of(sizes, limit)), sum(sizes)))
    return [score for score, _ in groups], sizes, kept, limit


def water_filling(scores, sizes, kept, limit):
    """The level by bisection in float64; scores near 1, as floats cannot hold more."""
    floors = floors_of(sizes, limit)

    def fill(level):
        return [
            min(size, floor + level * score)
            for score, size, floor in zip(scores, sizes, floors, strict=True)
        ]

    low, high = 0.0, 2.0 * max(sizes) / min(scores)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(fill(middle)) < kept else (low, middle)
    return fill(high)


def published_rounds(scores, sizes, kept, limit):
    """The paper's loop, with what it means to do: whole shares, rounded down, until all is given.

    One unit at a time goes to the group that is furthest below its share once all shares are 0.
    """
    found = floors_of(sizes, limit)
    scores = list(scores)
    while (left := kept - sum(found)) > 0:
        total = sum(scores)
        shares = [int(score / total * left) for score in scores]
        if not any(shares):
            shares[max(range(len(scores)), key=scores.__getitem__)] = 1
        for index, share in enumerate(shares):
            found[index] = min(sizes[index], found[index] + share)
            if found[index] == sizes[index]:
                scores[index] = 0.0
    return found


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_the_sum_is_exact_and_every_group_within_its_bounds(problem):
    scores, sizes, kept, limit = problem
    found = allocate_budget(scores, sizes, kept, max_sparsity=limit)
    assert sum(found) == kept
    for count, size, floor in zip(found, sizes, floors_of(sizes, limit), strict=True):
        assert floor <= count <= size
    assert allocate_budget(scores, sizes, kept, max_sparsity=limit) == found


@settings(max_examples=40, deadline=None)
@given(problem=problems(), random=st.randoms(use_true_random=False))
def test_the_order_of_groups_matters_only_between_equals(problem, random):
    scores, sizes, kept, limit = problem
    found = allocate_budget(scores, sizes, kept, max_sparsity=limit)
    order = list(range(len(sizes)))
    random.shuffle(order)
    shuffled = allocate_budget(
        [scores[i] for i in order], [sizes[i] for i in order], kept, max_sparsity=limit
    )
    named = zip(scores, sizes, found, strict=True)
    assert sorted(named) == sorted(
        zip([scores[i] for i in order], [sizes[i] for i in order], shuffled, strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_who_matters_more_a_parameter_keeps_the_larger_share(problem):
    scores, sizes, kept, limit = problem
    found = allocate_budget(scores, sizes, kept, max_sparsity=limit)
    for a in range(len(sizes)):
        for b in range(len(sizes)):
            if Fraction(scores[a]) * sizes[b] >= Fraction(scores[b]) * sizes[a] and scores[a]:
                # Two units: a floor is rounded up, and so is a share.
                assert Fraction(found[a] + 2, sizes[a]) >= Fraction(found[b] - 2, sizes[b])


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.floats(0.01, 100.0), st.integers(1, 100_000)), min_size=1, max_size=8
    ),
    limit=LIMITS,
    share=st.floats(0, 1),
)
def test_it_is_water_filling_to_within_a_unit(groups, limit, share):
    scores, sizes = [score for score, _ in groups], [size for _, size in groups]
    least = sum(floors_of(sizes, limit))
    kept = least + round(share * (sum(sizes) - least))
    found = allocate_budget(scores, sizes, kept, max_sparsity=limit)
    for count, expected in zip(found, water_filling(scores, sizes, kept, limit), strict=True):
        assert abs(count - expected) < 1 + 1e-6
    rounds = published_rounds(scores, sizes, kept, limit)
    for count, expected in zip(found, rounds, strict=True):
        assert abs(count - expected) <= 1 + len(sizes)  # a unit a group, where the loop stops


def test_a_full_group_hands_on_what_it_cannot_hold():
    # Floors 10 and 40; 30 are left, of which the first may have 10 though its share is 24.
    assert allocate_budget([8.0, 2.0], [20, 80], 80, max_sparsity=0.5) == [20, 60]
    assert allocate_budget([1.0, 1.0], [20, 80], 60, max_sparsity=0.5) == [15, 45]


def test_groups_without_a_score_take_what_others_cannot_hold_by_size():
    assert allocate_budget([1.0, 0.0, 0.0], [10, 30, 60], 64, max_sparsity=0.6) == [10, 18, 36]
    assert allocate_budget([0.0, 0.0], [10, 30], 20, max_sparsity=0.9) == [5, 15]


def test_a_decimal_limit_is_meant_as_it_is_written():
    """As floats, 1 - 0.6 is more than 0.4, and its product with 1000 would be rounded up to 401."""
    assert allocate_budget([0.0, 1.0], [1000, 1000], 1400, max_sparsity=Fraction("0.6")) == [
        400,
        1000,
    ]


@pytest.mark.parametrize(
    ("scores", "sizes", "kept", "limit", "message"),
    [
        ([1.0], [10], 3, 0.5, "3 of 10 cannot be kept .* at most 0.5: allowed are 5 to 10"),
        ([1.0], [10], 11, 0.5, "allowed are 5 to 10"),
        ([math.nan], [10], 5, 0.5, "scores must be finite"),
        ([-1.0], [10], 5, 0.5, "scores must be finite and at least 0"),
        ([1.0], [0], 0, 0.5, "sizes must be at least 1"),
        ([1.0], [10], 5, 1.5, "max_sparsity must lie between 0 and 1, not 1.5"),
    ],
)
def test_what_cannot_be_is_refused(scores, sizes, kept, limit, message):
    with pytest.raises(ValueError, match=message):
        allocate_budget(scores, sizes, kept, max_sparsity=limit)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 100_000), min_size=1, max_size=8), share=st.floats(0, 1))
def test_layers_of_a_group_lose_the_same_share(sizes, share):
    kept = len(sizes) + round(share * (sum(sizes) - len(sizes)))
    found = spread_evenly(kept, sizes)
    assert sum(found) == kept
    for count, size in zip(found, sizes, strict=True):
        assert 1 <= count <= size
        assert abs(count - kept * size / sum(sizes)) < 1 + len(sizes)


def test_more_layers_than_units_are_refused():
    with pytest.raises(ValueError, match="1 of 20 cannot be kept by 2 layers"):
        spread_evenly(1, [10, 10])
