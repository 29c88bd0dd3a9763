"""The solver of mixed precision, against trying every choice."""

from __future__ import annotations

import itertools
import os
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.compress.quantization.mixed.knapsack import (
    Candidate,
    allocate,
    least_bytes,
    price_of_a_byte,
    total_bytes,
)

TABLES = (7, 40)
# Whole numbers add up exactly, so that equal sums are equal.
LOSSES = st.integers(0, 1000).map(float)


def layers_of(table):
    return st.lists(
        st.lists(
            st.builds(Candidate, loss=LOSSES, size=st.integers(1, 60), table=table),
            min_size=1,
            max_size=4,
        ),
        min_size=1,
        max_size=5,
    )


def total_loss(choice, layers):
    return sum(row[index].loss for row, index in zip(layers, choice, strict=True))


def choices(layers):
    return itertools.product(*(range(len(row)) for row in layers))


@settings(max_examples=60, deadline=None)
@given(layers=layers_of(st.none()), slack=st.integers(0, 120))
def test_the_solver_equals_brute_force(layers, slack):
    budget = sum(min(item.size for item in row) for row in layers) + slack
    choice = allocate(layers, budget)
    assert total_bytes(layers, choice) <= budget
    fitting = [other for other in choices(layers) if total_bytes(layers, other) <= budget]
    best = min(total_loss(other, layers) for other in fitting)
    assert total_loss(choice, layers) == best
    assert allocate(layers, budget) == choice
    # Weak duality: no choice is better than what the price of bytes allows.
    price = price_of_a_byte(layers, budget)
    bound = sum(min(item.loss + price * item.size for item in row) for row in layers)
    assert bound - price * budget <= best + 1e-6 * max(1.0, best)


@settings(max_examples=60, deadline=None)
@given(layers=layers_of(st.sampled_from([None, 0, 1])), slack=st.integers(0, 120))
def test_a_shared_table_is_paid_once(layers, slack):
    def size(choice):
        read = {row[index].table for row, index in zip(layers, choice, strict=True)} - {None}
        own = sum(row[index].size for row, index in zip(layers, choice, strict=True))
        return own + sum(TABLES[table] for table in read)

    smallest = min(map(size, choices(layers)))
    assert least_bytes(layers, TABLES) == smallest
    budget = smallest + slack
    choice = allocate(layers, budget, TABLES)
    assert total_bytes(layers, choice, TABLES) == size(choice) <= budget
    best = min(total_loss(other, layers) for other in choices(layers) if size(other) <= budget)
    assert total_loss(choice, layers) == best
    read = sorted({row[i].table for row, i in zip(layers, choice, strict=True)} - {None})
    assert price_of_a_byte(layers, budget, TABLES, read) >= 0
    with pytest.raises(ValueError, match=f"take {smallest} bytes, the budget is {smallest - 1}"):
        allocate(layers, smallest - 1, TABLES)


def test_a_table_is_worth_what_all_its_layers_gain():
    """Alone none of them would pay for it."""
    row = [Candidate(loss=3.0, size=10), Candidate(loss=1.0, size=10, table=0)]
    assert allocate([row], 14, (5,)) == (0,)
    assert allocate([row] * 4, 44, (5,)) == (0, 0, 0, 0)
    assert allocate([row] * 4, 45, (5,)) == (1, 1, 1, 1)
    # Bytes that nobody needs buy nothing.
    assert price_of_a_byte([row] * 4, 45, (5,), (0,)) == 0


def test_losses_of_any_magnitude_are_told_apart():
    """Divergences of 8-bit layers are 1e-8: the solver's own tolerance would call them equal."""
    layers = [
        [Candidate(loss=3e-9, size=2), Candidate(loss=1e-9, size=4)],
        [Candidate(loss=9e-9, size=2), Candidate(loss=1e-9, size=4)],
    ]
    assert allocate(layers, 6) == (0, 1)
    assert allocate(layers, 4) == (0, 0)
    with pytest.raises(ValueError, match="take 4 bytes, the budget is 3"):
        allocate(layers, 3)


def test_of_equal_options_the_first_is_taken():
    same = Candidate(loss=1.0, size=8)
    assert allocate([[same, same, Candidate(loss=1.0, size=9)]] * 3, 40) == (0, 0, 0)


def test_standard_output_stays_clean(capfd):
    """HiGHS prints on its own account when a solution has to be polished, as this one has."""
    rng = Random(45)
    layers = []
    for _ in range(40):
        scale = 10 ** rng.uniform(-7, -2)
        size = rng.choice((4096, 12288, 16384, 36864, 98304))
        layers.append(
            [
                Candidate(
                    loss=scale * 4**-bits * rng.uniform(0.7, 1.3),
                    size=size * bits // 8 + size // group * 3,
                )
                for bits in (2, 3, 4, 8)
                for group in (64, 32)
            ]
        )
    allocate(layers, int(1.25 * sum(min(item.size for item in row) for row in layers)))
    os.write(1, b"kept\n")
    assert capfd.readouterr().out == "kept\n"
