"""Metrics of answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketvlm.evaluation.answers import anls, exact_match, normalize_answer


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Yes.", "yes"),
        ("  The  red circle! ", "red circle"),
        ("two", "2"),
        ("A", "a"),
        ("3.5", "3.5"),
        ("don't", "don't"),
        ("1,000 people", "1,000 people"),
        ('"top-left"', "top-left"),
        ("", ""),
        ("...", ""),
        ("ﬁve", "5"),  # a ligature is two letters
    ],
)
def test_normalisation(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing_but_what_articles_hid(text: str) -> None:
    once = normalize_answer(text)
    assert exact_match(text, text) == 1.0
    assert exact_match(once, text) == float(normalize_answer(once) == once)


def test_exact_match_tells_answers_apart() -> None:
    assert exact_match("Red", "red.") == 1.0
    assert exact_match("red circle", "red") == 0.0
    assert exact_match("", "yes") == 0.0


def slow_distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        slow_distance(a[1:], b) + 1,
        slow_distance(a, b[1:]) + 1,
        slow_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_anls_is_the_edit_distance_over_the_longer_text(a: str, b: str) -> None:
    longer = max(len(a), len(b))
    expected = 1 - slow_distance(a, b) / longer if longer else 1.0
    assert anls(a, b) == pytest.approx(expected if expected >= 0.5 else 0.0)
    assert anls(a, b) == anls(b, a)


def test_anls_forgives_a_letter_and_not_half_a_word() -> None:
    assert anls("pocketvlm", "Pocketvlm ") == 1.0
    assert anls("hat", "cat") == pytest.approx(2 / 3)
    assert anls("dog", "cat") == 0.0
