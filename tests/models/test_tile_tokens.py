"""Tokens of tiles: shared out as no other way would be fairer, and no more than there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pocketvlm.bundle import TileBudget, share_out
from pocketvlm.models.images.tile_tokens import tile_detail, tile_tokens
from pocketvlm.models.images.tilings import ONE_TILE, TileGrid
from pocketvlm.models.images.tilings.anyres import MapGrid

importances = st.lists(st.integers(0, 40), min_size=1, max_size=5)
ladders = st.sets(st.integers(1, 24), min_size=2, max_size=4).map(lambda found: (*sorted(found),))


def unfairness(counts: Sequence[int], importance: Sequence[int]) -> Fraction:
    """What Sainte-Lague's method makes least, whatever is shared: squares over claims."""
    return sum(
        (Fraction(count**2, claim) for count, claim in zip(counts, importance, strict=True)),
        Fraction(),
    )


@settings(max_examples=60, deadline=None)
@given(
    importance=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    first=st.integers(1, 9),
    step=st.integers(1, 5),
    above=st.integers(0, 12),
)
def test_no_other_counts_of_the_same_sum_are_fairer(importance, first, step, above):
    levels = tuple(range(first, first + 4 * step, step))
    counts = share_out(importance, levels, min(first + above, levels[-1]))
    others = (each for each in product(levels, repeat=len(importance)) if sum(each) == sum(counts))
    assert unfairness(counts, importance) == min(unfairness(each, importance) for each in others)


@given(importance=importances, levels=ladders, data=st.data())
def test_counts_are_levels_within_the_sum_and_no_step_is_left(importance, levels, data):
    average = data.draw(st.integers(levels[0], levels[-1]))
    counts = share_out(importance, levels, average)
    left = average * len(importance) - sum(counts)
    assert set(counts) <= set(levels)
    assert left >= 0
    steps = [levels[levels.index(count) + 1] - count for count in counts if count != levels[-1]]
    assert all(step > left for step in steps)
    # A tile with more importance never has fewer tokens.
    order = sorted(range(len(counts)), key=lambda tile: (importance[tile], counts[tile]))
    assert [counts[tile] for tile in order] == sorted(counts)


@given(importance=importances, levels=ladders, data=st.data())
def test_the_order_of_tiles_decides_nothing_but_ties(importance, levels, data):
    assume(len(set(importance)) == len(importance))
    average = data.draw(st.integers(levels[0], levels[-1]))
    order = data.draw(st.permutations(range(len(importance))))
    counts = share_out(importance, levels, average)
    moved = share_out([importance[tile] for tile in order], levels, average)
    quotients = [
        Fraction(claim, low + high) for claim in importance for low, high in pairwise(levels)
    ]
    assume(len(set(quotients)) == len(quotients))
    assert moved == [counts[tile] for tile in order]


def test_equal_tiles_share_alike_and_the_first_takes_what_is_left():
    assert share_out([7, 7, 7], (4, 8, 12), 8) == [8, 8, 8]
    assert share_out([7, 7, 7], (4, 8), 6) == [8, 4, 4]
    assert share_out([0, 0, 5], (4, 8, 16), 8) == [4, 4, 16]
    assert share_out([], (4, 8), 6) == []


def test_a_step_counts_half_way_up_it():
    """By the tokens above a step, which favours the many, it would be three and one."""
    assert share_out([20, 13], (1, 2, 3, 4), 2) == [2, 2]


BUDGET = TileBudget(whole=6, tile=4, levels=(2, 4, 8), by="whole_tokens")


def test_tiles_are_told_apart_by_the_tokens_of_the_whole():
    grid = TileGrid(rows=2, columns=2)  # of 4 x 4 tokens, two by two in each
    pixels = np.zeros((5, 3, 16, 16), np.float32)
    kept = np.array([2, 3, 6, 7, 8, 15])  # four of the second tile, one of the third and last
    assert tile_tokens(BUDGET, grid, 16, pixels=pixels, kept=kept) == [2, 8, 4, 2, 6]
    # Of tiles that are left out, nothing is asked, and others share for fewer.
    some = replace(grid, left_out=(1, 2))
    assert tile_tokens(BUDGET, some, 16, pixels=pixels[:3], kept=kept) == [4, 4, 6]
    assert tile_tokens(BUDGET, ONE_TILE, 16, pixels=pixels[:1], kept=kept) == [6]


def test_tiles_are_told_apart_by_their_pixels():
    budget = replace(BUDGET, by="detail", levels=(2, 4, 6))
    grid = MapGrid(rows=1, columns=2, picture=(64, 32))
    rng = np.random.default_rng(0)
    pixels = np.zeros((3, 3, 32, 32), np.float32)
    pixels[0] = rng.standard_normal((3, 32, 32))  # the whole, which comes first and is not asked
    pixels[2, :, :8, :8] = 1
    assert tile_tokens(budget, grid, 16, pixels=pixels, kept=np.arange(6)) == [6, 2, 6]
    alone = MapGrid(rows=0, columns=0, picture=(64, 32))
    assert tile_tokens(budget, alone, 16, pixels=pixels[:1], kept=np.arange(6)) == [6]


@given(rows=st.integers(1, 3), columns=st.integers(1, 3), data=st.data(), seed=st.integers(0, 99))
def test_a_picture_takes_no_more_rows_than_are_counted_for_it(rows, columns, data, seed):
    grid = TileGrid(rows=rows, columns=columns)
    left_out = data.draw(st.sets(st.sampled_from([*grid.parts]))) if grid.parts else set()
    grid = replace(grid, left_out=(*sorted(left_out),))
    rng = np.random.default_rng(seed)
    pixels = rng.standard_normal((grid.tiles, 3, 16, 16), np.float32)
    kept = np.sort(rng.choice(16, 6, replace=False))
    for by in ("whole_tokens", "detail"):
        budget = replace(BUDGET, by=by)
        counts = tile_tokens(budget, grid, 16, pixels=pixels, kept=kept)
        assert len(counts) == grid.tiles
        assert sum(counts) <= grid.most_rows(16, budget.tile, budget.whole)
    even = TileBudget(whole=6, tile=4, levels=(4,), by="nothing")
    counts = tile_tokens(even, grid, 16, pixels=pixels, kept=kept)
    assert sum(counts) == grid.most_rows(16, even.tile, even.whole)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(8, 33), width=st.integers(8, 33), seed=st.integers(0, 99))
def test_detail_is_that_of_a_loop(height, width, seed):
    pixels = np.random.default_rng(seed).standard_normal((3, height, width)).astype(np.float32)
    steps = []
    for channel in pixels.astype(np.float64):
        means = [
            [channel[8 * row : 8 * row + 8, 8 * at : 8 * at + 8].mean() for at in range(width // 8)]
            for row in range(height // 8)
        ]
        for row, line in enumerate(means):
            for at, mean in enumerate(line):
                steps += [abs(mean - line[at + 1])] if at + 1 < len(line) else []
                steps += [abs(mean - means[row + 1][at])] if row + 1 < len(means) else []
    expected = 1000 * sum(steps) / len(steps) if steps else 0
    assert tile_detail(pixels) == pytest.approx(expected, abs=0.51)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": ()}, "levels are"),
        ({"levels": (0, 4)}, "needed are numbers from 1 on, ascending"),
        ({"levels": (8, 4)}, "needed are numbers from 1 on, ascending"),
        ({"tile": 9}, "levels allow 2 to 8"),
        ({"by": "nothing"}, "every tile has 4 tokens"),
    ],
)
def test_budgets_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(BUDGET, **changes)
