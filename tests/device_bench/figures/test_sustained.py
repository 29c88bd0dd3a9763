"""Sustained runs on scripted throttling."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pocketvlm.device_bench.block import SensorSample, SustainedAnswer
from pocketvlm.device_bench.figures.sustained import summarise_sustained
from tests.device_bench.rig import make_block


def run(rate_at, *, seconds=600.0, new_tokens=65, ttft_ms=200.0, turns=1):
    """Answers of a device whose decode rate is a function of the time."""
    answers, now_s = [], 0.0
    while now_s < seconds:
        for turn in range(turns):
            rate = rate_at(now_s)
            span_ms = (new_tokens - 1) / rate * 1e3
            wait_ms = ttft_ms * rate_at(0.0) / rate / (1 + 4 * turn)
            now_s += (span_ms + wait_ms) / 1e3
            answers.append(
                SustainedAnswer(
                    at_s=now_s,
                    turn=turn,
                    ttft_user_ms=wait_ms,
                    prefill_ms=wait_ms / 2,
                    decode_span_ms=span_ms,
                    prompt_tokens=100,
                    new_tokens=new_tokens,
                )
            )
    return answers


def summarise(answers, sensors=(), began_ms=0.0):
    block = replace(
        make_block(),
        sustained=tuple(answers),
        sensors=tuple(sensors),
        sustained_at_ms=began_ms,
    )
    return summarise_sustained(block)


def test_a_device_that_keeps_its_speed_retains_all_of_it():
    found = summarise(run(lambda _: 40.0))
    assert found.decode_tok_s.burst == pytest.approx(40.0)
    assert found.decode_tok_s.retained == pytest.approx(1.0)
    assert found.ttft_user_ms.retained == pytest.approx(1.0)
    assert found.duration_s == pytest.approx(600, abs=2)
    assert found.time_to_status_s == {}


def test_a_device_that_halves_its_clock_after_two_minutes_retains_half():
    found = summarise(run(lambda at_s: 40.0 if at_s < 120 else 20.0))
    assert (found.decode_tok_s.burst, found.decode_tok_s.last) == pytest.approx((40.0, 20.0))
    assert found.decode_tok_s.retained == pytest.approx(0.5)
    assert found.ttft_user_ms.burst == pytest.approx(200.0)
    assert found.ttft_user_ms.last == pytest.approx(400.0)
    assert found.ttft_user_ms.retained == pytest.approx(0.5)


def test_the_last_tenth_sees_a_recovery_and_not_the_dip_before_it():
    found = summarise(run(lambda at_s: 10.0 if 200 < at_s < 500 else 30.0))
    assert found.decode_tok_s.retained == pytest.approx(1.0)


def test_a_decline_is_averaged_over_a_tenth_by_time():
    found = summarise(run(lambda at_s: 40.0 - at_s / 30))
    assert found.decode_tok_s.burst == pytest.approx(39.0, rel=0.01)
    assert found.decode_tok_s.last == pytest.approx(21.0, rel=0.01)


def test_first_turns_alone_are_compared_and_all_of_them_are_kept():
    answers = run(lambda _: 40.0, turns=3)
    found = summarise(answers)
    firsts = [answer for answer in answers if answer.turn == 0]
    assert found.ttft_user_ms.burst == pytest.approx(200.0)
    assert found.answers == len(firsts) == len(found.at_s) == len(found.decode_tok_s.samples)
    assert found.decode_tok_s.samples[0] == pytest.approx(40.0)
    assert found.duration_s == pytest.approx(answers[-1].at_s, abs=1e-3)


def test_states_are_timed_from_the_first_answer_even_where_one_was_passed_unseen():
    statuses = [(0, 2), (10, 0), (30, 0), (70, 1), (130, 3), (200, 2), (400, None)]
    sensors = [SensorSample(at_ms=at * 1e3, thermal_status=status) for at, status in statuses]
    found = summarise(run(lambda _: 40.0), sensors, 10e3)
    assert found.time_to_status_s == {"light": 60.0, "moderate": 120.0, "severe": 120.0}
    assert list(found.time_to_status_s) == ["light", "moderate", "severe"]


def test_one_long_answer_is_both_ends_and_none_is_nothing():
    found = summarise(run(lambda _: 40.0, seconds=0.1))
    assert (found.answers, found.decode_tok_s.retained) == (1, 1.0)
    assert summarise([]) is None
