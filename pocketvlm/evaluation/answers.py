"""Metrics of answers: normalised exact match, or ANLS for text in pictures."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Mapping
from typing import Literal, get_args

__all__ = [
    "METRICS",
    "METRIC_NAMES",
    "MetricName",
    "anls",
    "exact_match",
    "normalize_answer",
]

MetricName = Literal["exact_match", "anls"]
METRIC_NAMES: tuple[str, ...] = get_args(MetricName)

_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_ARTICLES = frozenset({"a", "an", "the"})
# A point or comma inside a number and an apostrophe inside a word belong to the answer.
_MARK = f"[{re.escape(string.punctuation)}]"
_PUNCTUATION = re.compile(rf"(?<!\w){_MARK}|{_MARK}(?!\w)")
_ANLS_THRESHOLD = 0.5


def normalize_answer(text: str) -> str:
    """Lower case, no articles, no punctuation around words, number words to ten as digits.

    The steps are those of the VQA v2 evaluation, without its table of contractions.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = _PUNCTUATION.sub(" ", folded).split()
    kept = [_NUMBERS.get(word, word) for word in words if word not in _ARTICLES]
    # "a" may be the whole answer, as the letter of a multiple choice.
    return " ".join(kept or words)


def exact_match(answer: str, reference: str) -> float:
    """1.0 if answer and reference are equal after normalisation, else 0.0."""
    return float(normalize_answer(answer) == normalize_answer(reference))


def anls(answer: str, reference: str) -> float:
    """Normalised Levenshtein similarity (ANLS, arXiv 1907.00490), for text in pictures.

    1 - distance / longer length, and 0 if that is below one half. Case and surrounding spaces are
    ignored.
    """
    found, expected = answer.strip().casefold(), reference.strip().casefold()
    longer = max(len(found), len(expected))
    similarity = 1.0 if longer == 0 else 1 - _edit_distance(found, expected) / longer
    return similarity if similarity >= _ANLS_THRESHOLD else 0.0


def _edit_distance(first: str, second: str) -> int:
    previous = list(range(len(second) + 1))
    for row, left in enumerate(first, start=1):
        current = [row]
        for column, right in enumerate(second, start=1):
            current.append(
                min(
                    previous[column] + 1,
                    current[-1] + 1,
                    previous[column - 1] + (left != right),
                )
            )
        previous = current
    return previous[-1]


METRICS: Mapping[MetricName, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "anls": anls,
}
"""Credit in [0, 1] for an answer, given the reference, by name."""
