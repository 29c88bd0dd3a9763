"""The exponent of tokens, from runs whose exponent is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pocketvlm.errors import InputError
from pocketvlm.pipeline.advice.measured_law import TokenScore, fit_tokens, read_token_scores
from pocketvlm.reference.shapes import load_shape

COUNTS = (4, 8, 16, 32, 64)
SPEC = load_shape("smolvlm-256m").spec


def drawn(rng, beta, n=1000, scale=0.4):
    wrong = rng.binomial(n, scale * np.array(COUNTS, float) ** -beta)
    return [
        TokenScore(tokens=count, wrong=float(w), n=n)
        for count, w in zip(COUNTS, wrong, strict=True)
    ]


def test_the_interval_holds_the_exponent_as_often_as_it_says():
    rng, beta = np.random.default_rng(0), 0.2
    fits = [fit_tokens(drawn(rng, beta), weights=1e9) for _ in range(300)]
    inside = np.mean([fit.beta_low <= beta <= fit.beta_high for fit in fits])
    assert 0.92 <= inside <= 0.98
    assert np.mean([fit.law.beta for fit in fits]) == pytest.approx(beta, abs=0.01)
    assert np.mean([fit.misfit for fit in fits]) == pytest.approx(1, abs=0.2)


def test_the_law_expects_what_was_measured_at_the_size_that_was_measured():
    scores = [TokenScore(tokens=k, wrong=1e5 * 0.4 * k**-0.3, n=100_000) for k in COUNTS]
    fit = fit_tokens(scores, weights=2.5e8)
    for score in scores:
        assert fit.law.error(2.5e8, score.tokens) == pytest.approx(score.wrong / score.n, rel=1e-3)
    assert fit.law.beta == pytest.approx(0.3, abs=1e-3)


def test_runs_off_every_power_are_said_to_be():
    off = [TokenScore(tokens=k, wrong=w, n=1000) for k, w in zip(COUNTS, (500, 80, 75, 74, 73))]  # noqa: B905
    assert any("trust the runs" in line for line in fit_tokens(off, weights=1e9).lines())
    flat = [TokenScore(tokens=k, wrong=100, n=1000) for k in COUNTS]
    told = fit_tokens(flat, weights=1e9).lines()
    assert any("has 0 in it" in line for line in told)
    assert not any("trust the runs" in line for line in told)


def test_no_wrong_answer_is_not_an_error_of_nothing():
    scores = [TokenScore(tokens=k, wrong=0, n=100) for k in COUNTS]
    assert np.isfinite(fit_tokens(scores, weights=1e9).law.beta)


def test_two_numbers_of_tokens_make_no_law():
    scores = [TokenScore(tokens=k, wrong=5, n=100) for k in (8, 16, 16)]
    with pytest.raises(InputError, match="keep 2 different numbers"):
        fit_tokens(scores, weights=1e9)


def report(tmp_path, **changes):
    model = {"family": SPEC.family, "visual_tokens": 32, "visual_tokens_full": SPEC.visual_tokens}
    quality = {"compressed": {"n": 200, "correct": 150.5, "accuracy": 0.7525}}
    document = {"schema": 2, "model": {**model, **changes}, "quality": quality}
    (tmp_path / "report.json").write_text(json.dumps(document))
    return tmp_path


def test_a_run_is_read_from_its_report(tmp_path):
    assert read_token_scores([report(tmp_path)], SPEC) == (
        TokenScore(tokens=32, wrong=49.5, n=200),
    )


@pytest.mark.parametrize("changes", [{"family": "llava"}, {"visual_tokens_full": 576}])
def test_a_run_of_another_model_is_refused(tmp_path, changes):
    with pytest.raises(InputError, match="allowed are runs of this"):
        read_token_scores([report(tmp_path, **changes)], SPEC)


def test_a_run_without_a_score_is_refused(tmp_path):
    path = report(tmp_path)
    document = json.loads((path / "report.json").read_text())
    document |= {"quality": None, "size": {"bundle_bytes": 7}}
    (path / "report.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="has no score"):
        read_token_scores([path], SPEC)
