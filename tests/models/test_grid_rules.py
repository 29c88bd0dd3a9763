"""Grid rules: examples of the papers, loops of their formulas, and what never fails."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.models.images.tilings.anyres import Anyres
from pocketvlm.models.images.tilings.grid_rules import RelaxedRatio, SliceCount
from pocketvlm.models.images.tilings.split_grid import SplitGrid

NINE = [(rows, columns) for rows in (1, 2, 3) for columns in (1, 2, 3)]
EDGES = st.integers(1, 4000)
GRIDS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12)


@pytest.mark.parametrize("size", [(394, 390), (380, 76)])
def test_the_papers_pictures_stay_one_tile(size: tuple[int, int]):
    """LLaVA-NeXT cuts the first into 2 x 2, InternVL the second into 1 x 5."""
    assert RelaxedRatio().choose(*size, NINE, 384) == (1, 1)
    if size == (394, 390):
        assert RelaxedRatio(alpha=0.0).choose(*size, NINE, 384) == (2, 2)


@settings(max_examples=300)
@given(width=EDGES, height=EDGES, grids=GRIDS)
def test_without_a_margin_it_is_the_rule_of_llava_next(width, height, grids):
    tiling = Anyres(
        side=96, resolutions=tuple((96 * rows, 96 * columns) for rows, columns in grids)
    )
    rows, columns = RelaxedRatio(alpha=0.0).choose(width, height, grids, 96)
    chosen = (96 * rows, 96 * columns)
    assert chosen in tiling.resolutions
    # Of several that show and waste as much, which one is a matter of order.
    best = tiling.resolution(width, height)
    assert shown(width, height, chosen) == shown(width, height, best)
    assert math.prod(chosen) == math.prod(best)


def shown(width: int, height: int, size: tuple[int, int]) -> int:
    scale = min(size[1] / width, size[0] / height)
    return min(int(width * scale) * int(height * scale), width * height)


@settings(max_examples=300)
@given(width=EDGES, height=EDGES, alpha=st.sampled_from([0.05, 0.1, 0.3]))
def test_the_walk_from_the_largest_to_the_smallest_is_the_papers(width, height, alpha):
    best, kept, wasted = (3, 3), 0, math.inf
    for rows, columns in sorted(NINE, key=lambda grid: -grid[0] * grid[1]):
        effective = shown(width, height, (384 * rows, 384 * columns))
        waste = 384 * 384 * rows * columns - effective
        gain = effective - kept
        if gain > alpha * kept or (-gain <= alpha * kept and waste < wasted):
            best, kept, wasted = (rows, columns), effective, waste
    assert RelaxedRatio(alpha=alpha).choose(width, height, NINE, 384) == best
    if width <= 384 and height <= 384:
        assert best == (1, 1)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((336, 336), (1, 1)), ((337, 336), (1, 2)), ((672, 1088), (3, 2)), ((1344, 336), (1, 4))],
)
def test_slices_are_as_many_as_there_are_pixels_for(size, grid):
    grids = [(rows, columns) for rows in range(1, 7) for columns in range(1, 7)]
    assert SliceCount().choose(*size, grids, 336) == grid


@settings(max_examples=300)
@given(width=EDGES, height=EDGES, side=st.integers(32, 600), edges=st.integers(1, 6))
def test_no_grid_of_about_the_ideal_number_is_nearer_in_ratio(width, height, side, edges):
    grids = [(rows, columns) for rows in range(1, edges + 1) for columns in range(1, edges + 1)]
    rows, columns = SliceCount().choose(width, height, grids, side)
    ideal = min(math.ceil(Fraction(width * height, side * side)), edges * edges)
    if ideal == 1:
        assert (rows, columns) == (1, 1)
        return
    near = [grid for grid in grids if abs(math.prod(grid) - ideal) <= 1 and grid != (1, 1)]
    if not near:
        assert (rows, columns) in grids
        return
    assert (rows, columns) in near

    def away(grid: tuple[int, int]) -> float:
        return abs(math.log(width / height) - math.log(grid[1] / grid[0]))

    assert away((rows, columns)) <= min(map(away, near)) + 1e-12


@settings(max_examples=200)
@given(
    width=EDGES,
    height=EDGES,
    rule=st.sampled_from([RelaxedRatio(), RelaxedRatio(alpha=1.0), SliceCount()]),
    edges=st.integers(1, 5),
)
def test_a_ruled_tiling_holds_its_bounds(width, height, rule, edges):
    tiling = SplitGrid(side=64, first=64 * edges, rule=rule)
    grid = tiling.grid(width, height)
    assert grid.tiles <= tiling.most_tiles
    size = (grid.columns * 64, grid.rows * 64)
    assert tiling.resizes(width, height) == (size, size)
    assert tiling.limited(5).rule == rule
    assert tiling.limited(5).grid(width, height).tiles <= 5


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_a_share_is_between_0_and_1(alpha):
    with pytest.raises(ValueError, match=f"alpha is {alpha}; allowed are 0 to 1"):
        RelaxedRatio(alpha=alpha)
