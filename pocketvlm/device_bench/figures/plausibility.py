"""Checks of every figure before it is printed: does it contradict physics, or another figure?

Published tables contain rates of zero, figures without samples, times to first token that fit no
definition of the printed prefill rate, peak memory below the weights that were read, and runs that
began on a hot device. One comparison catches each. A figure that fails is not published: it stays
in the document, marked, and the command ends with 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from pocketvlm.reports.measurement import Latency, Memory, PlausibilityCheck, Sensors

__all__ = ["Physics", "check_plausibility"]

# Part of the prompt may come from a cache or overlap with an earlier stage, but not half of it.
_TTFT_SHARE = 0.5
# Sampling one token is all that the engine's time to first token has beside the prefill.
_TTFT_EXCESS = 2.0
# Memory-mapped weights count once they are touched; a process that touched less than half of them
# has not run the model.
_MEMORY_SHARE = 0.5
# The bandwidth is measured with a plain reduction, while other processes may run.
_BANDWIDTH_ALLOWANCE = 2.0
# Both times have their own clock readings.
_CLOCK_ALLOWANCE = 1.02

_TIMED = ("ttft_user_ms", "ttft_engine_ms", "prefill_tok_s", "decode_tok_s")


@dataclass(frozen=True, kw_only=True)
class Physics:
    """What is known about the bundle and the machine, independent of the measurement.

    Attributes:
        prompt_tokens: Visual and text tokens that the decoder prefilled.
        weight_bytes: Bytes of all graphs of the arm, external data included.
        decoder_bytes: Bytes of the decoder's weights, which each step reads once.
        memory_read_bytes_s: Bytes per second that the machine reads from memory.
        cache_bytes: Its last-level cache; weights that fit are not limited by memory.
    """

    prompt_tokens: int
    weight_bytes: int
    decoder_bytes: int | None = None
    memory_read_bytes_s: float | None = None
    cache_bytes: int | None = None


def check_plausibility(
    latency: Latency, memory: Memory, physics: Physics, sensors: Sensors | None = None
) -> tuple[PlausibilityCheck, ...]:
    """Checks the figures of one arm.

    Args:
        latency: The figures of the arm.
        memory: Memory of its processes.
        physics: What they must not contradict.
        sensors: Thermal status while it was measured.
    """

    def typical(name: str) -> float | None:
        return latency.figure(name).median

    return (
        _has_samples(latency),
        _above_zero("prefill_tok_s", typical("prefill_tok_s")),
        _above_zero("decode_tok_s", typical("decode_tok_s")),
        _ttft_covers_prompt(typical("ttft_engine_ms"), typical("prefill_tok_s"), physics),
        _ttft_is_the_prompt(typical("ttft_engine_ms"), typical("prefill_tok_s"), physics),
        _ttft_user_contains_engine(typical("ttft_user_ms"), typical("ttft_engine_ms")),
        _bandwidth(typical("decode_tok_s"), physics),
        _memory_holds_weights(memory, physics),
        _starts_cool(sensors),
    )


@dataclass(frozen=True, kw_only=True)
class _Question:
    """A check that is not answered yet: its name, and what a failure withholds."""

    check: str
    figures: tuple[str, ...]

    def judge(self, value: float, bound: float, *, holds: bool, detail: str) -> PlausibilityCheck:
        return PlausibilityCheck(
            check=self.check,
            figures=self.figures,
            verdict="pass" if holds else "fail",
            value=value,
            bound=bound,
            detail=detail,
        )

    def skip(self, why: str) -> PlausibilityCheck:
        return PlausibilityCheck(
            check=self.check, figures=self.figures, verdict="not applicable", detail=why
        )


def _has_samples(latency: Latency) -> PlausibilityCheck:
    invented = sorted(
        name
        for name, figure in latency.figures.items()
        if figure.median is not None and not figure.samples
    )
    question = _Question(check="every figure has samples", figures=tuple(invented))
    if not latency.figures:
        return question.skip("nothing was measured")
    return question.judge(
        len(invented), 0, holds=not invented, detail=", ".join(invented) or "figures without any"
    )


def _above_zero(name: str, rate: float | None) -> PlausibilityCheck:
    question = _Question(check=f"{name} is above zero", figures=(name,))
    if rate is None:
        return question.skip(f"{name} was not measured")
    return question.judge(rate, 0.0, holds=rate > 0, detail="tokens per second")


def _ttft_covers_prompt(
    ttft_ms: float | None, rate: float | None, physics: Physics
) -> PlausibilityCheck:
    question = _Question(
        check="time to first token covers the prompt", figures=("ttft_engine_ms", "prefill_tok_s")
    )
    if ttft_ms is None or not rate:
        return question.skip("time to first token or prefill rate was not measured")
    least = physics.prompt_tokens / rate * 1e3 * _TTFT_SHARE
    return question.judge(
        ttft_ms,
        least,
        holds=ttft_ms >= least,
        detail=f"ms; at least half of {physics.prompt_tokens} tokens at {rate:.4g} per second",
    )


def _ttft_is_the_prompt(
    ttft_ms: float | None, rate: float | None, physics: Physics
) -> PlausibilityCheck:
    question = _Question(
        check="time to first token is that of the prompt",
        figures=("ttft_engine_ms", "prefill_tok_s"),
    )
    if ttft_ms is None or not rate:
        return question.skip("time to first token or prefill rate was not measured")
    most = physics.prompt_tokens / rate * 1e3 * _TTFT_EXCESS
    return question.judge(
        ttft_ms,
        most,
        holds=ttft_ms <= most,
        detail=f"ms; at most twice {physics.prompt_tokens} tokens at {rate:.4g} per second",
    )


def _ttft_user_contains_engine(user_ms: float | None, engine_ms: float | None) -> PlausibilityCheck:
    question = _Question(
        check="the user's time to first token contains the engine's",
        figures=("ttft_user_ms", "ttft_engine_ms"),
    )
    if user_ms is None or engine_ms is None:
        return question.skip("one of the two was not measured")
    holds = user_ms * _CLOCK_ALLOWANCE >= engine_ms
    return question.judge(user_ms, engine_ms, holds=holds, detail="ms")


def _bandwidth(rate: float | None, physics: Physics) -> PlausibilityCheck:
    question = _Question(check="decoding reads no faster than memory", figures=("decode_tok_s",))
    size, cache = physics.decoder_bytes, physics.cache_bytes
    if rate is None or size is None or physics.memory_read_bytes_s is None:
        return question.skip("decode rate, weight bytes or memory bandwidth is not known")
    if cache is not None and size <= cache:
        return question.skip(f"{size:,} bytes of decoder fit into the cache of {cache:,}")
    read = rate * size
    most = physics.memory_read_bytes_s * _BANDWIDTH_ALLOWANCE
    return question.judge(
        read / 1e9,
        most / 1e9,
        holds=read <= most,
        detail="GB/s; at most twice what a plain reduction reads here",
    )


def _memory_holds_weights(memory: Memory, physics: Physics) -> PlausibilityCheck:
    question = _Question(
        check="peak memory holds the weights that were touched", figures=("peak_rss_bytes",)
    )
    peak, before = memory.peak_rss_bytes, memory.before_load_rss_bytes
    if peak is None or before is None:
        return question.skip("peak memory was not measured")
    grown, least = float(peak - before), physics.weight_bytes * _MEMORY_SHARE
    return question.judge(
        grown,
        least,
        holds=grown >= least,
        detail="bytes above the empty process; at least half of the arm's graphs",
    )


def _starts_cool(sensors: Sensors | None) -> PlausibilityCheck:
    question = _Question(check="the device was not throttled at the start", figures=_TIMED)
    if sensors is None or sensors.status_before is None:
        return question.skip("the device does not tell its thermal status")
    return question.judge(
        sensors.status_before,
        0,
        holds=sensors.status_before == 0,
        detail="thermal status, of 0 (none) to 6 (shutdown)",
    )
