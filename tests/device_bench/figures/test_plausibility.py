"""Each kind of error found in published tables is caught, and consistent figures pass."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pocketvlm.device_bench.figures.plausibility import Physics, check_plausibility
from pocketvlm.device_bench.figures.summary import summarise_blocks
from pocketvlm.reports.measurement import Figure, Latency, Memory, Sensors

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


def published(**medians):
    """A table's row: one number for every figure, and the sample that it is of."""
    return Latency(
        figures={name: Figure(samples=(value,), median=value) for name, value in medians.items()}
    )


@pytest.mark.parametrize(
    ("figures", "prompt_tokens", "expected"),
    [
        # AI Hub 0.65, qwen3_vl_2b_instruct at context 4096 on Galaxy S25.
        (published(decode_tok_s=0.0), 4096, "decode_tok_s is above zero"),
        # gemma_4_e2b_it on VENTUNO Q: 2,742 s for 4096 tokens at 47.8 per second, which take 86.
        (
            published(ttft_engine_ms=2_742_397.0, prefill_tok_s=47.8),
            4096,
            "time to first token is that of the prompt",
        ),
        # InternVL3.5-2B on Galaxy S25: 30 ms where 128 tokens take 122.
        (
            published(ttft_engine_ms=30.0, prefill_tok_s=1047.0),
            128,
            "time to first token covers the prompt",
        ),
        # A forum's answer: 100 tokens per second and 35 ms, measured by nobody.
        (
            Latency(figures={"decode_tok_s": Figure(median=100.0)}),
            64,
            "every figure has samples",
        ),
    ],
)
def test_errors_of_published_tables_are_caught(figures, prompt_tokens, expected):
    physics = replace(PHYSICS, prompt_tokens=prompt_tokens, decoder_bytes=None)
    assert failed(figures, physics=physics) == [expected]


def test_an_encoder_of_300_mb_does_not_run_in_13_mb():
    memory = Memory(before_load_rss_bytes=0, peak_rss_bytes=13_000_000)
    physics = replace(PHYSICS, weight_bytes=300_000_000)
    assert failed(published(vision_ms=80.0), memory, physics) == [
        "peak memory holds the weights that were touched"
    ]


def test_a_run_that_begins_on_a_throttled_device_is_caught(block):
    figures = summarise_blocks([block()])
    checks = check_plausibility(figures, MEMORY, PHYSICS, Sensors(status_before=1, status_peak=1))
    (check,) = [check for check in checks if check.verdict == "fail"]
    assert check.check == "the device was not throttled at the start"
    assert "decode_tok_s" in check.figures
    cool = check_plausibility(figures, MEMORY, PHYSICS, Sensors(status_before=0, status_peak=3))
    assert {check.verdict for check in cool} == {"pass"}
