"""What a row sees, against the rule spelled out row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from pocketvlm.graph.visibility import capped_attention, visible_rows
from pocketvlm.runtime.splice import whole_rows

NUMBERS = [-1, -1, 4, 4, 4, -1, 5, 5, -1, -1]


def sees(row: int, slot: int, window: int | None, numbers: list[int] | None) -> bool:
    if numbers is not None and numbers[row] >= 0 and numbers[row] == numbers[slot]:
        return True
    return slot <= row and (window is None or row - slot < window)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(
    ("held", "numbers"),
    [(0, None), (4, None), (0, NUMBERS), (2, NUMBERS), (5, NUMBERS), (0, [0] * 10)],
)
def test_a_row_sees_the_past_within_its_window_and_the_rows_of_its_number(held, window, numbers):
    slots = torch.arange(held, 10)
    mutual = None if numbers is None else torch.tensor([numbers[held:]])
    found = visible_rows(slots, 12, window=window, mutual=mutual)[0]
    expected = [
        [slot < 10 and sees(row, slot, window, numbers) for slot in range(12)]
        for row in range(held, 10)
    ]
    assert found.tolist() == expected


def test_rows_of_a_batch_have_their_own_numbers():
    mutual = torch.tensor([[0, 0, -1], [-1, 7, 7]])
    found = visible_rows(torch.arange(3), 3, mutual=mutual)
    assert found[0].tolist() == [[True, True, False], [True, True, False], [True, True, True]]
    assert found[1].tolist() == [[True, False, False], [True, True, True], [True, True, True]]


def test_a_large_bound_leaves_attention_as_it_is_and_a_small_one_does_not():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 6, 8) for heads in (4, 2, 2))
    visible = visible_rows(torch.arange(6), 6)[:, None]
    plain = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, enable_gqa=True
    )
    torch.testing.assert_close(capped_attention(query, key, value, visible, 1e4), plain)
    assert (capped_attention(query, key, value, visible, 0.5) - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("count", "whole"), [(0, 0), (2, 2), (3, 2), (4, 2), (5, 5), (7, 6), (8, 8), (10, 10)]
)
def test_a_call_never_ends_among_rows_that_see_each_other(count, whole):
    assert whole_rows(np.array(NUMBERS), count) == whole
