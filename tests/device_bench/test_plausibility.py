"""Each kind of error found in published tables is caught, and consistent figures pass."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pocketvlm.device_bench.plausibility import Physics, check_plausibility
from pocketvlm.device_bench.summary import summarise_blocks
from pocketvlm.reports.measurement import Latency, Memory

MEMORY = Memory(before_load_rss_bytes=50_000_000, peak_rss_bytes=170_000_000)
PHYSICS = Physics(
    prompt_tokens=40,
    weight_bytes=100_000_000,
    decoder_bytes=60_000_000,
    memory_read_bytes_s=20e9,
    cache_bytes=8_000_000,
)


def failed(latency, memory=MEMORY, physics=PHYSICS):
    checks = check_plausibility(latency, memory, physics)
    return [check.check for check in checks if check.verdict == "fail"]


def with_median(latency, name, value):
    changed = replace(latency.figure(name), median=value)
    return Latency(figures={**latency.figures, name: changed})


def test_honest_figures_pass_every_check(block):
    checks = check_plausibility(summarise_blocks([block()]), MEMORY, PHYSICS)
    assert [check.verdict for check in checks] == ["pass"] * 8 + ["not applicable"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("decode_tok_s", 0.0, "decode_tok_s is above zero"),
        ("prefill_tok_s", 0.0, "prefill_tok_s is above zero"),
        # 40 tokens at 2,000 tok/s take 20 ms; 9 ms is another definition.
        ("ttft_engine_ms", 9.0, "time to first token covers the prompt"),
        ("ttft_user_ms", 12.0, "the user's time to first token contains the engine's"),
        # 60 MB at 1,000 tokens per second are 60 GB/s on a machine that reads 20.
        ("decode_tok_s", 1000.0, "decoding reads no faster than memory"),
    ],
)
def test_nonsense_is_caught(block, name, value, expected):
    figures = with_median(summarise_blocks([block()]), name, value)
    assert failed(figures) == [expected]


def test_memory_below_the_weights_is_caught(block):
    figures = summarise_blocks([block()])
    memory = Memory(before_load_rss_bytes=50_000_000, peak_rss_bytes=63_000_000)
    assert failed(figures, memory) == ["peak memory holds the weights that were touched"]


def test_what_is_not_known_is_not_judged(block):
    figures = with_median(summarise_blocks([block()]), "decode_tok_s", 1000.0)
    in_cache = Physics(
        prompt_tokens=40,
        weight_bytes=100_000_000,
        decoder_bytes=6_000_000,
        memory_read_bytes_s=1e9,
        cache_bytes=8_000_000,
    )
    assert failed(figures, physics=in_cache) == []
    physics = Physics(prompt_tokens=1, weight_bytes=1)
    checks = check_plausibility(Latency(), Memory(), physics)
    assert {check.verdict for check in checks} == {"not applicable"}
    assert all(check.detail for check in checks)
