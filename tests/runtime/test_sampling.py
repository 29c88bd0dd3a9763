"""Draws follow the nucleus, and the likeliest token wins at temperature 0."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketvlm.runtime.sampling import GREEDY, Sampling

logits_of = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12).map(
    lambda values: np.array(values, np.float32)
)


def nucleus(logits, temperature, top_p):
    """The tokens that may be drawn and their probabilities, the slow way."""
    weights = [np.exp(np.float64(x) / temperature) for x in logits]
    shares = [w / sum(weights) for w in weights]
    kept, total = {}, 0.0
    for token in sorted(range(len(shares)), key=lambda t: -shares[t]):
        kept[token] = shares[token]
        total += shares[token]
        if total >= top_p:
            break
    return {token: share / total for token, share in kept.items()}


@given(logits=logits_of)
def test_greedy_takes_the_first_of_the_likeliest(logits):
    assert GREEDY.choose(logits, GREEDY.generator()) == int(np.argmax(logits))


@given(logits=logits_of, seed=st.integers(0, 99))
def test_tiny_nucleus_is_greedy(logits, seed):
    sampling = Sampling(temperature=1.0, top_p=1e-9, seed=seed)
    chosen = sampling.choose(logits, sampling.generator())
    # Logits that differ by less than float32 can tell apart have the same probability.
    assert logits[chosen] == pytest.approx(logits.max(), rel=1e-6, abs=1e-6)


@given(
    logits=logits_of,
    temperature=st.floats(0.1, 3),
    top_p=st.floats(0.05, 1),
    seed=st.integers(0, 99),
)
def test_draws_stay_in_the_nucleus(logits, temperature, top_p, seed):
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    generator = sampling.generator()
    # Half a step wider: where the sum meets top_p exactly, roundings decide.
    allowed = nucleus(logits, temperature, min(top_p + 1e-9, 1))
    least = min(logits[token] for token in allowed)
    for _ in range(5):
        assert logits[sampling.choose(logits, generator)] >= least


def test_frequencies_are_the_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampling = Sampling(temperature=2.0, top_p=0.9)
    generator = sampling.generator()
    draws = np.bincount([sampling.choose(logits, generator) for _ in range(6000)], minlength=4)
    expected = nucleus(logits, 2.0, 0.9)
    for token, count in enumerate(draws):
        assert count / 6000 == pytest.approx(expected.get(token, 0), abs=0.03)


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}]
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ValueError, match="it must be"):
        Sampling(**options)
