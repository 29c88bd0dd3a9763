"""Checks of every figure before it is printed: does it contradict physics, or another figure?

Published tables contain rates of zero, times to first token that are too short for the printed
prefill rate, and peak memory below the weights that were read. One comparison catches each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pocketvlm.reports.measurement import Latency, Memory, PlausibilityCheck

__all__ = ["Physics", "check_plausibility"]

# Part of the prompt may come from a cache or overlap with an earlier stage, but not half of it.
_TTFT_SHARE = 0.5
# Memory-mapped weights count once they are touched; a process that touched less than half of them
# has not run the model.
_MEMORY_SHARE = 0.5
# The bandwidth is measured with a plain reduction, while other processes may run.
_BANDWIDTH_ALLOWANCE = 2.0
# Both times have their own clock readings.
_CLOCK_ALLOWANCE = 1.02


@dataclass(frozen=True, kw_only=True)
class Physics:
    """What is known about the bundle and the machine, independent of the measurement.

    Attributes:
        prompt_tokens: Visual and text tokens that the decoder prefilled.
        weight_bytes: Bytes of all graphs of the bundle, external data included.
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
    role: str, latency: Latency, memory: Memory, physics: Physics
) -> tuple[PlausibilityCheck, ...]:
    """Checks the figures of one bundle.

    Args:
        role: `candidate` or `baseline`.
        latency: The figures of the bundle.
        memory: The resident sets of its processes.
        physics: What they must not contradict.
    """

    def typical(name: str) -> float | None:
        return latency.figure(name).median

    checks = (
        _above_zero("prefill_tok_s", typical("prefill_tok_s")),
        _above_zero("decode_tok_s", typical("decode_tok_s")),
        _ttft_fits_rate(typical("ttft_engine_ms"), typical("prefill_tok_s"), physics),
        _ttft_user_contains_engine(typical("ttft_user_ms"), typical("ttft_engine_ms")),
        _bandwidth(typical("decode_tok_s"), physics),
        _memory_holds_weights(memory, physics),
    )
    return tuple(replace(check, role=role) for check in checks)


def _judge(
    check: str, value: float, bound: float, *, holds: bool, detail: str
) -> PlausibilityCheck:
    return PlausibilityCheck(
        check=check,
        verdict="pass" if holds else "fail",
        value=value,
        bound=bound,
        detail=detail,
    )


def _skip(check: str, why: str) -> PlausibilityCheck:
    return PlausibilityCheck(check=check, verdict="not applicable", detail=why)


def _above_zero(name: str, rate: float | None) -> PlausibilityCheck:
    check = f"{name} is above zero"
    if rate is None:
        return _skip(check, f"{name} was not measured")
    return _judge(check, rate, 0.0, holds=rate > 0, detail="tokens per second")


def _ttft_fits_rate(
    ttft_ms: float | None, rate: float | None, physics: Physics
) -> PlausibilityCheck:
    check = "time to first token covers the prompt"
    if ttft_ms is None or not rate:
        return _skip(check, "time to first token or prefill rate was not measured")
    least = physics.prompt_tokens / rate * 1e3 * _TTFT_SHARE
    return _judge(
        check,
        ttft_ms,
        least,
        holds=ttft_ms >= least,
        detail=f"ms; at least half of {physics.prompt_tokens} tokens at {rate:.4g} per second",
    )


def _ttft_user_contains_engine(user_ms: float | None, engine_ms: float | None) -> PlausibilityCheck:
    check = "the user's time to first token contains the engine's"
    if user_ms is None or engine_ms is None:
        return _skip(check, "one of the two was not measured")
    holds = user_ms * _CLOCK_ALLOWANCE >= engine_ms
    return _judge(check, user_ms, engine_ms, holds=holds, detail="ms")


def _bandwidth(rate: float | None, physics: Physics) -> PlausibilityCheck:
    check = "decoding reads no faster than memory"
    size, cache = physics.decoder_bytes, physics.cache_bytes
    if rate is None or size is None or physics.memory_read_bytes_s is None:
        return _skip(check, "decode rate, weight bytes or memory bandwidth is not known")
    if cache is not None and size <= cache:
        return _skip(check, f"{size:,} bytes of decoder fit into the cache of {cache:,}")
    read = rate * size
    most = physics.memory_read_bytes_s * _BANDWIDTH_ALLOWANCE
    return _judge(
        check,
        read / 1e9,
        most / 1e9,
        holds=read <= most,
        detail="GB/s; at most twice what a plain reduction reads here",
    )


def _memory_holds_weights(memory: Memory, physics: Physics) -> PlausibilityCheck:
    check = "peak memory holds the weights that were touched"
    peak, before = memory.peak_rss_bytes, memory.before_load_rss_bytes
    if peak is None or before is None:
        return _skip(check, "peak memory was not measured")
    grown, least = float(peak - before), physics.weight_bytes * _MEMORY_SHARE
    return _judge(
        check,
        grown,
        least,
        holds=grown >= least,
        detail="bytes above the empty process; at least half of the bundle's graphs",
    )
