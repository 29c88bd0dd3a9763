"""Selection: exact counts, even rows, the highest scores, the left one of equals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.compress.pruning.unstructured.patterns import (
    Blocked,
    SemiStructured,
    Unstructured,
    select,
)


def scores_of(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, so that ties are met.
    return torch.randint(0, 7, (rows, columns), generator=generator).to(torch.float64)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 1000), st.data())
def test_unstructured_keeps_the_best_of_every_row(rows, columns, seed, data):
    kept = data.draw(st.integers(0, rows * columns))
    scores = scores_of(rows, columns, seed)
    mask = select(scores, Unstructured(), kept)
    assert int(mask.sum()) == kept
    counts = mask.sum(dim=1)
    assert int(counts.max() - counts.min()) <= 1
    for row in range(rows):
        best = sorted(range(columns), key=lambda j, row=row: (-float(scores[row, j]), j))
        assert set(best[: int(counts[row])]) == set(mask[row].nonzero().flatten().tolist())


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000), st.sampled_from([(2, 4), (4, 8)])
)
def test_semi_structured_keeps_n_of_every_m(rows, groups, seed, counts):
    keep, of = counts
    scores = scores_of(rows, groups * of, seed)
    mask = select(scores, SemiStructured(keep=keep, of=of), rows * groups * keep)
    for row in range(rows):
        for start in range(0, groups * of, of):
            chosen = mask[row, start : start + of]
            assert int(chosen.sum()) == keep
            kept, lost = scores[row, start : start + of][chosen], scores[row, start : start + of]
            assert float(kept.min()) >= float(lost[~chosen].max())


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 1000), st.data())
def test_blocks_are_kept_or_removed_whole(bands, cells, seed, data):
    pattern = Blocked(rows=2, columns=4)
    kept = data.draw(st.integers(0, bands * cells))
    scores = scores_of(2 * bands, 4 * cells, seed)
    mask = select(scores, pattern, kept * pattern.elements)
    whole = mask.reshape(bands, 2, cells, 4).sum(dim=(1, 3))
    assert set(whole.flatten().tolist()) <= {0, pattern.elements}
    assert int(mask.sum()) == kept * pattern.elements
    sums = scores.reshape(bands, 2, cells, 4).sum(dim=(1, 3))
    for band in range(bands):
        chosen = whole[band] > 0
        if bool(chosen.any()) and not bool(chosen.all()):
            assert float(sums[band][chosen].min()) >= float(sums[band][~chosen].max())


@pytest.mark.parametrize(
    ("pattern", "kept"), [(Unstructured(), 17), (SemiStructured(), 7), (Unstructured(), -1)]
)
def test_a_count_that_does_not_suit_is_refused(pattern, kept):
    with pytest.raises(ValueError, match="keep|kept"):
        select(torch.ones(4, 4), pattern, kept)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SemiStructured(keep=4, of=4), "keep must lie"),
        (lambda: Blocked(rows=0), "at least 1 x 1"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
