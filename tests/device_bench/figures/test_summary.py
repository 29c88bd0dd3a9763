from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketvlm.device_bench.figures.summary import (
    FIGURES,
    paired_ratios,
    relative_spread,
    summarise_blocks,
    summarise_repeats,
    summarise_samples,
)
from pocketvlm.reports.measurement import Figure

SAMPLES = st.lists(st.floats(min_value=0.01, max_value=1e5), min_size=1, max_size=40)


@given(SAMPLES)
def test_statistics_are_of_the_samples_that_are_kept(values):
    figure = summarise_samples(values)
    kept = figure.samples
    assert kept == tuple(round(value, 4) for value in values)
    assert figure.median == statistics.median(kept)
    assert figure.mean == pytest.approx(statistics.fmean(kept))
    assert figure.sd == (pytest.approx(statistics.stdev(kept)) if len(kept) > 1 else None)
    assert figure.median <= figure.p90 <= figure.p95 <= max(kept)


def test_the_99_per_cent_quantile_needs_a_hundred_samples():
    assert summarise_samples([float(value) for value in range(99)]).p99 is None
    figure = summarise_samples([1.0] * 98 + [50.0, 70.0])
    assert figure.p95 == 1.0
    assert figure.p99 == pytest.approx(50.2)


def test_nothing_is_claimed_of_no_samples():
    assert summarise_samples([]) == Figure()


def test_rates_and_times_follow_their_definitions(block):
    figures = summarise_blocks([block(1.0), block(3.0)]).figures
    assert set(figures) == {"load_ms", "cold_ttft_user_ms", *FIGURES}
    # 40 rows in 20 ms and in 60 ms; 4 tokens after the first in 12 ms and in 36 ms.
    assert figures["prefill_tok_s"].samples == pytest.approx((2000.0, 666.6667))
    assert figures["decode_tok_s"].samples == pytest.approx((333.3333, 111.1111))
    assert figures["decode_ms"].samples == (2.0,) * 4 + (6.0,) * 4
    assert figures["load_ms"].median == 200.0
    assert figures["cold_ttft_user_ms"].samples == (146.0, 438.0)


def test_a_process_stands_for_what_it_does_when_left_alone(block):
    answer = block().answers[0]
    busy = replace(answer, ttft_user_ms=500.0, decode_span_ms=120.0)
    disturbed = replace(block(), answers=(answer, busy, answer, answer, busy))
    figures = summarise_repeats({0: block(), 2: disturbed}).figures
    assert figures["ttft_user_ms"].by_repeat == (73.0, None, 73.0)
    assert figures["decode_tok_s"].by_repeat == pytest.approx((333.3333, None, 333.3333))
    assert figures["load_ms"].by_repeat == (100.0, None, 100.0)
    assert figures["ttft_user_ms"].samples[-1] == 500.0


def test_a_stage_that_a_workload_lacks_has_no_samples(block):
    (answer,) = block().answers
    text_only = replace(answer, preprocess_ms=None, vision_ms=None)
    latency = summarise_blocks([replace(block(), answers=(text_only,))])
    assert latency.figure("vision_ms") == Figure()
    assert latency.figure("prefill_ms").median == 20.0


def test_pairing_cancels_the_drift_that_medians_keep(block):
    """The machine slows down by half each repeat; the candidate is twice as fast throughout."""
    drift = [1.0, 1.5, 2.25, 3.375, 5.0625]
    candidate = {index: block(0.5 * scale) for index, scale in enumerate(drift)}
    baseline = {index: block(scale) for index, scale in enumerate(drift)}
    del candidate[0]  # a repeat that failed on one side is not a pair
    ratios = paired_ratios(candidate, baseline)
    assert ratios["ttft_user_ms"] == pytest.approx((0.5,) * 4)
    assert ratios["decode_tok_s"] == pytest.approx((2.0,) * 4, rel=1e-4)
    medians = [
        statistics.median(rows[index].answers[0].ttft_user_ms for index in rows)
        for rows in (candidate, baseline)
    ]
    assert abs(medians[0] / medians[1] - 0.5) > 0.1


def test_the_spread_is_that_of_the_middle():
    assert relative_spread([10.0] * 19 + [1000.0]) < relative_spread([10.0, 20.0] * 5)
    assert relative_spread([5.0, 5.0, 5.0]) == 0.0
