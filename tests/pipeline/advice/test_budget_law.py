"""The budget law against its closed form, and against every other choice."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.pipeline.advice.budget_law import (
    PUBLISHED_LAWS,
    BudgetLaw,
    best_offer,
    tokens_for,
)

SCENES, TEXT = PUBLISHED_LAWS


def law(alpha, beta, least_tokens=1):
    return BudgetLaw(
        name="any",
        alpha=alpha,
        beta=beta,
        scale=0.5,
        floor=0.0,
        least_tokens=least_tokens,
        source="a test",
    )


@pytest.mark.parametrize(("text_rows", "tokens"), [(0, 1), (50, 12), (100, 24)])
def test_the_optimum_of_any_size_is_the_published_one(text_rows, tokens):
    assert round(SCENES.free_optimum(text_rows)) == tokens


def test_where_tokens_are_worth_more_than_weights_all_are_taken():
    assert TEXT.free_optimum(50) is None
    offer = best_offer(
        TEXT, weights=1e9, tokens=100, text_rows=50, native_tokens=576, most_weights=math.inf
    )
    assert offer.tokens == 576
    assert offer.weights == pytest.approx(1e9 * 150 / 626)


@pytest.mark.parametrize(("flops", "tokens"), [(2254e9, 111), (5008e9, 307)])
def test_where_memory_ends_a_decoder_the_rest_of_the_compute_buys_tokens(flops, tokens):
    """The worked example of seven billion weights."""
    offer = best_offer(
        SCENES,
        weights=flops / 2 / 626,
        tokens=576,
        text_rows=50,
        native_tokens=576,
        most_weights=7e9,
    )
    assert offer.weights == pytest.approx(7e9, rel=0.01)
    assert abs(offer.tokens - tokens) <= 1
    assert tokens_for(flops, 7e9, 50) == pytest.approx(tokens, abs=1)


@given(
    exponents=st.tuples(st.floats(0.01, 0.3), st.floats(0.005, 0.3)),
    weights=st.floats(1e8, 1e10),
    tokens=st.integers(1, 700),
    text_rows=st.integers(1, 300),
    most_weights=st.one_of(st.floats(1e8, 2e10), st.just(math.inf)),
    least_tokens=st.integers(1, 300),
    other=st.tuples(st.floats(0, 1), st.floats(0.01, 1)),
)
@settings(max_examples=150, deadline=None)
def test_no_choice_within_the_limits_is_better(
    exponents, weights, tokens, text_rows, most_weights, least_tokens, other
):
    native = 700
    asked = law(*exponents, least_tokens)
    offer = best_offer(
        asked,
        weights=weights,
        tokens=tokens,
        text_rows=text_rows,
        native_tokens=native,
        most_weights=most_weights,
    )
    budget = weights * (text_rows + tokens)
    assert least_tokens <= offer.tokens <= native
    assert offer.weights * (text_rows + offer.tokens) <= budget * (1 + 1e-9)
    assert offer.weights <= most_weights
    count = least_tokens + round(other[0] * (native - least_tokens))
    size = other[1] * min(budget / (text_rows + count), most_weights)
    assert asked.error(size, count) >= asked.error(offer.weights, offer.tokens) * (1 - 1e-12)


@given(exponents=st.tuples(st.floats(0.05, 0.3), st.floats(0.005, 0.04)), rows=st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_without_limits_the_search_finds_the_closed_form(exponents, rows):
    asked = law(*exponents)
    offer = best_offer(
        asked, weights=1e9, tokens=64, text_rows=rows, native_tokens=2000, most_weights=math.inf
    )
    assert abs(offer.tokens - min(2000, asked.free_optimum(rows))) <= 1


def test_no_compute_for_the_text_alone_leaves_no_tokens():
    assert tokens_for(2 * 1e9 * 100, 4e9, 50) == 0
